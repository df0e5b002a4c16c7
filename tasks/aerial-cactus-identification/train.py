"""Is there a cactus in the photograph? A small convolutional network."""

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

EPOCHS, BATCH, RATE = 2, 64, 0.001
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def load(part, names):
    """Images [n, 3, 32, 32], values 0 to 1."""
    images = [np.asarray(Image.open(f"data/{part}/{name}").convert("RGB")) for name in names]
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255


def train(X, y):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 8 * 8, 1),
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
    """Probabilities [n] of a cactus."""
    return torch.cat([model(x.to(device))[:, 0].sigmoid().cpu() for x in X.split(512)]).numpy()


labels = pd.read_csv("data/train.csv")
X = load("train", labels["id"])
y = torch.tensor(labels["has_cactus"].to_numpy(), dtype=torch.float32)
held_out = len(X) // 5  # the rows are in random order already
model = train(X[held_out:], y[held_out:])

submission = pd.read_csv("data/sample_submission.csv")
submission["has_cactus"] = predict(model, load("test", submission["id"]))
submission.to_csv("submission.csv", index=False)
print(f"validation auc: {roc_auc_score(y[:held_out], predict(model, X[:held_out])):.5f}")
