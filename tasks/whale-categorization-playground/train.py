"""Which whale is it? A small convolutional network on grey, shrunken photographs of tails."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

SIDE = 96  # pixels
EPOCHS, BATCH, RATE = 5, 64, 0.001
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def read(path):
    with Image.open(path) as image:
        image.draft("L", (SIDE, SIDE))  # decodes no more than it needs
        return np.asarray(image.convert("L").resize((SIDE, SIDE)))


def load(part, names):
    """Images [n, 1, SIDE, SIDE], values 0 to 1."""
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, [f"data/{part}/{name}" for name in names])))
    return torch.tensor(images)[:, None] / 255


def train(X, y, classes):
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, classes),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for epoch in range(EPOCHS):
        losses = []
        for rows in torch.randperm(len(X)).split(BATCH):
            loss = cross_entropy(model(X[rows].to(device)), y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} loss {np.mean(losses):.4f}")
    return model


@torch.no_grad()
def predict(model, X, names):
    """The five likeliest ids of each image, best first, as an array of text [n, 5]."""
    best = [model(x.to(device)).topk(min(5, len(names))).indices.cpu() for x in X.split(512)]
    return names[torch.cat(best).numpy()]


def map5(truth, ranked):
    """1 / rank of the right id among the five, else 0; the mean over images."""
    return ((ranked == truth[:, None]) / np.arange(1, ranked.shape[1] + 1)).sum(1).mean()


labels = pd.read_csv("data/train.csv").sample(frac=1, random_state=0)
X = load("train", labels["Image"])
held_out = len(X) // 10
names, y = np.unique(labels["Id"].to_numpy()[held_out:].astype(str), return_inverse=True)
model = train(X[held_out:], torch.tensor(y), len(names))

submission = pd.read_csv("data/sample_submission.csv")
ranked = predict(model, load("test", submission["Image"]), names)
submission["Id"] = [" ".join(row) for row in ranked]
submission.to_csv("submission.csv", index=False)
truth = labels["Id"].to_numpy()[:held_out].astype(str)
truth[~np.isin(truth, names)] = "new_whale"  # as the test part has it
print(f"validation map5: {map5(truth, predict(model, X[:held_out], names)):.5f}")
