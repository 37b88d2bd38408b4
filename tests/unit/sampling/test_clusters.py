"""Clusters of image codes: k-means, the file, and the program that makes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from megavideo.data_tools.cluster_codes import main

from megavideo.data.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from megavideo.sampling.clusters import cluster_codes, load_labels, save_labels


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """90 points in 6 heaps far from each other, and the heap of each."""
    generator = torch.Generator().manual_seed(0)
    heap = torch.arange(90) % 6
    centres = 20 * torch.randn(6, 4, generator=generator)
    return centres[heap] + torch.randn(90, 4, generator=generator), heap


def test_heaps_are_found() -> None:
    points, heap = blobs()
    labels = cluster_codes(points, 6, seed=0)
    for number in range(6):
        assert len(labels[heap == number].unique()) == 1
    assert len(labels.unique()) == 6


def test_no_cluster_is_empty_and_the_seed_fixes_all() -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).round()
    labels = cluster_codes(points, 12, seed=5)
    assert (labels.bincount(minlength=12) > 0).all()
    assert torch.equal(labels, cluster_codes(points, 12, seed=5))


def test_more_clusters_than_different_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 different codes"):
        cluster_codes(torch.tensor([[0.0], [1.0], [1.0], [2.0]]), 4, seed=0)


def test_labels_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    save_labels(path, torch.arange(10) % 3)
    assert torch.equal(load_labels(path, 10), torch.arange(10) % 3)
    with pytest.raises(ValueError, match="cluster-codes"):
        load_labels(path, 11)
    np.save(path, np.zeros(10))
    with pytest.raises(ValueError, match="float64"):
        load_labels(path, 10)
    np.save(path, np.full(10, 1 << 40))  # as many clusters would be allocated
    with pytest.raises(ValueError, match="10 integers below 10"):
        load_labels(path, 10)
    np.savez(tmp_path / "labels.npz", np.zeros(10))
    (tmp_path / "empty.npy").touch()
    for name in ("labels.npz", "empty.npy"):
        with pytest.raises(ValueError, match=f"{name} is no .npy file"):
            load_labels(tmp_path / name, 10)


def test_the_program_groups_a_tokenizers_codes(tmp_path: Path) -> None:
    config = ImageTokenizerConfig(channels=4, z_channels=4, num_codes=64, rates=(8,))
    torch.manual_seed(0)
    ImageTokenizer(config).save(tmp_path / "image.safetensors")
    arguments = [str(tmp_path / "image.safetensors"), str(tmp_path / "out.npy"), "--clusters", "8"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "64 codes in 8 clusters" in result.output
    assert len(load_labels(tmp_path / "out.npy", 64).unique()) == 8
