"""Features in clusters, and their cosine similarity in float64."""

import numpy as np
import torch

BACKENDS = ["faiss", "torch"]


def blobs(n, classes=4, width=6, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=generator)
    return centers[y] + spread * torch.randn(n, width, generator=generator), y


def exact_similarity(bank, queries):
    bank, queries = (x.double().numpy() for x in (bank, queries))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    return queries @ bank.T
