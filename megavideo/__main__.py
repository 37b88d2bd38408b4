"""`python -m megavideo`: what every launcher ends in."""

from megavideo.cli import main

main()
