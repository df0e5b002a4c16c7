"""Dog or cat? A small convolutional network on shrunken photographs, trained on a part of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

SIDE = 64  # pixels
IMAGES = 5000  # of the training images
EPOCHS, BATCH, RATE = 3, 64, 0.001
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def read(path):
    with Image.open(path) as image:
        image.draft("RGB", (SIDE, SIDE))  # decodes no more than it needs
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE)))


def load(paths):
    """Images [n, 3, SIDE, SIDE], values 0 to 1."""
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, paths)))
    return torch.tensor(images).permute(0, 3, 1, 2) / 255


def train(X, y):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 2, 1),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for epoch in range(EPOCHS):
        losses = []
        for rows in torch.randperm(len(X)).split(BATCH):
            logits = model(X[rows].to(device))[:, 0]
            loss = binary_cross_entropy_with_logits(logits, y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} loss {np.mean(losses):.4f}")
    return model


@torch.no_grad()
def predict(model, X):
    """Probabilities [n] of a dog."""
    p = torch.cat([model(x.to(device))[:, 0].sigmoid().cpu() for x in X.split(512)])
    return p.double().numpy()


paths = sorted(Path("data/train").glob("*.jpg"))
paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:IMAGES]]
X = load(paths)
y = torch.tensor([float(path.name.startswith("dog")) for path in paths])
held_out = len(X) // 5
model = train(X[held_out:], y[held_out:])

submission = pd.read_csv("data/sample_submission.csv")
submission["label"] = predict(model, load([f"data/test/{i}.jpg" for i in submission["id"]]))
submission.to_csv("submission.csv", index=False)
print(f"validation log_loss: {log_loss(y[:held_out], predict(model, X[:held_out])):.5f}")
