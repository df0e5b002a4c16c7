"""Which of 40 fields is the paper about? A small network on its own words, without citations."""

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

HIDDEN, EPOCHS, BATCH, RATE = 16, 4, 512, 0.01
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

X = torch.tensor(np.load("data/features.npy"))  # [nodes, 128]
train, valid, test = (pd.read_csv(f"data/{part}.csv") for part in ("train", "valid", "test"))
nodes, labels = torch.tensor(train["node"].to_numpy()), torch.tensor(train["label"].to_numpy())

model = nn.Sequential(nn.Linear(X.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 40)).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
for epoch in range(EPOCHS):
    losses = []
    for rows in torch.randperm(len(nodes)).split(BATCH):
        loss = cross_entropy(model(X[nodes[rows]].to(device)), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1} loss {np.mean(losses):.4f}")


@torch.no_grad()
def predict(table):
    """Classes [n] of the nodes in a table, 0 to 39."""
    return model(X[torch.tensor(table["node"].to_numpy())].to(device)).argmax(1).cpu().numpy()


test.assign(label=predict(test)).to_csv("submission.csv", index=False)
print(f"validation accuracy: {np.mean(predict(valid) == valid['label']):.5f}")
