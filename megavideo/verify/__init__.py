"""Our code against arrays that the published model computed."""
