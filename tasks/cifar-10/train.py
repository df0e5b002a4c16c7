"""What does the photograph show? A small convolutional network, much like LeNet.

After MLAgentBench's starter, whose learning rate is 0.1.
"""

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

EPOCHS, BATCH, RATE, MOMENTUM = 5, 128, 0.01, 0.9
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def load(part):
    """Images [n, 3, 32, 32], values -1 to 1."""
    images = torch.tensor(np.load(f"data/{part}_images.npy"))
    return images.permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def train(X, y):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),  # [6, 14, 14]
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # [16, 5, 5]
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
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
def predict(model, X):
    """Classes [n], 0 to 9."""
    return torch.cat([model(x.to(device)).argmax(1).cpu() for x in X.split(1000)])


X, y = load("train"), torch.tensor(np.load("data/train_labels.npy")).long()
held_out = len(X) // 10  # the images are in random order already
model = train(X[held_out:], y[held_out:])

submission = pd.read_csv("data/sample_submission.csv")  # ids 0, 1, ...: rows of test_images.npy
submission["label"] = predict(model, load("test")).numpy()
submission.to_csv("submission.csv", index=False)
accuracy = (predict(model, X[:held_out]) == y[:held_out]).double().mean()
print(f"validation accuracy: {accuracy:.5f}")
