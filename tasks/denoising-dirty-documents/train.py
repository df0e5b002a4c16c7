"""Clean scanned pages. Two small convolutions that look at the 5 x 5 pixels around each pixel."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

CHANNELS, EPOCHS, RATE = 8, 3, 0.01
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)


def read(path):
    """A page [1, 1, rows, columns], 0 black to 1 white."""
    grey = np.asarray(Image.open(path).convert("L"), dtype=np.float32)
    return torch.tensor(grey / 255)[None, None].to(device)


names = sorted(path.name for path in Path("data/train").glob("*.png"))
names = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
pages = [(read(f"data/train/{name}"), read(f"data/train_cleaned/{name}")) for name in names]
held_out = len(pages) // 5

model = nn.Sequential(
    nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, 1, 3, padding=1)
).to(device)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
for epoch in range(EPOCHS):
    losses = []
    for i in torch.randperm(len(pages) - held_out):
        dirty, clean = pages[held_out + i]
        loss = ((model(dirty) - clean) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1} rmse {np.sqrt(np.mean(losses)):.4f}")


@torch.no_grad()
def predict(dirty):
    """The clean page [rows, columns]."""
    return model(dirty)[0, 0].clamp(0, 1).cpu().numpy()


with open("submission.csv", "w") as file:
    file.write("id,value\n")
    for path in sorted(Path("data/test").glob("*.png")):
        for row, line in enumerate(predict(read(path)).tolist(), start=1):
            for column, value in enumerate(line, start=1):
                file.write(f"{path.stem}_{row}_{column},{value:.4f}\n")
errors = [(predict(dirty) - clean[0, 0].cpu().numpy()).ravel() for dirty, clean in pages[:held_out]]
print(f"validation rmse: {np.sqrt(np.mean(np.concatenate(errors) ** 2)):.5f}")
