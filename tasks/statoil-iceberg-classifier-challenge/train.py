"""Ship or iceberg? A small convolutional network on two bands of radar."""

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

EPOCHS, BATCH, RATE = 5, 32, 0.001
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def train(X, y):
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.ReLU(), nn.MaxPool2d(3),  # [16, 24, 24]
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),  # [32, 11, 11]
        nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2),  # [32, 4, 4]
        nn.Flatten(), nn.Linear(32 * 4 * 4, 1),
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
    """Probabilities [n] of an iceberg."""
    p = torch.cat([model(x.to(device))[:, 0].sigmoid().cpu() for x in X.split(512)])
    return p.double().numpy()


labels = pd.read_csv("data/train.csv")
y = torch.tensor(labels["is_iceberg"].to_numpy(), dtype=torch.float32)
X, X_test = (torch.tensor(np.load(f"data/{part}_bands.npy")) for part in ("train", "test"))
mean, spread = X.mean((0, 2, 3), keepdim=True), X.std((0, 2, 3), keepdim=True)  # of each band
X, X_test = (X - mean) / spread, (X_test - mean) / spread
held_out = len(X) // 5  # the rows are in random order already
model = train(X[held_out:], y[held_out:])

submission = pd.read_csv("data/test.csv")[["id"]]  # in the order of test_bands.npy
submission["is_iceberg"] = predict(model, X_test)
submission.to_csv("submission.csv", index=False)
print(f"validation log_loss: {log_loss(y[:held_out], predict(model, X[:held_out])):.5f}")
