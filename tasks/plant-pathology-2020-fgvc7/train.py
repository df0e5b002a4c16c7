"""Which illness does the apple leaf have? A small convolutional network on shrunken photographs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

SIDE = 128  # pixels
EPOCHS, BATCH, RATE = 3, 32, 0.001
CLASSES = ["healthy", "multiple_diseases", "rust", "scab"]
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def read(name):
    with Image.open(f"data/images/{name}.jpg") as image:
        image.draft("RGB", (SIDE, SIDE))  # decodes no more than it needs
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE)))


def load(names):
    """Images [n, 3, SIDE, SIDE], values 0 to 1."""
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, names)))
    return torch.tensor(images).permute(0, 3, 1, 2) / 255


def train(X, y):
    layers, channels = [], 3
    for width in (16, 32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(CLASSES))]
    model = nn.Sequential(*layers, *head).to(device)
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
    return model.eval()


@torch.no_grad()
def predict(model, X):
    """Probabilities [n, 4]."""
    return torch.cat([model(x.to(device)).softmax(1).cpu() for x in X.split(128)]).numpy()


labels = pd.read_csv("data/train.csv")
X = load(labels["image_id"])
y = torch.tensor(labels[CLASSES].to_numpy().argmax(1))  # exactly one of the four is 1
held_out = len(X) // 5  # the rows are in random order already
model = train(X[held_out:], y[held_out:])

submission = pd.read_csv("data/sample_submission.csv")
submission[CLASSES] = predict(model, load(submission["image_id"]))
submission.to_csv("submission.csv", index=False)
score = roc_auc_score(labels[CLASSES][:held_out], predict(model, X[:held_out]), average="macro")
print(f"validation mean_auc: {score:.5f}")
