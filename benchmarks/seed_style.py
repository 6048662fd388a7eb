"""The usual tutorial's captioner, written only for the speed benchmark to be measured against.

A frozen ResNet runs once per caption, in fp32 and the default memory layout, in front of an LSTM. Worker processes
decode a picture anew for each of its captions, and nothing is kept.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

from data.transforms import Transform, open_picture
from models.encoder import EncoderCNN


@dataclass
class CaptionPerPicture(Dataset):
    rows: list[tuple[Path, list[int]]]  # a picture and the word ids of one of its captions
    transform: Transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, ids = self.rows[index]
        return self.transform(open_picture(path)), torch.tensor(ids)


def collate(items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    items.sort(key=lambda item: len(item[1]), reverse=True)
    lengths = [len(caption) for _, caption in items]
    return torch.stack([image for image, _ in items]), pad_sequence([c for _, c in items], batch_first=True), lengths


class Captioner(nn.Module):
    def __init__(self, encoder: EncoderCNN, vocab_size: int, embed: int = 256, hidden: int = 512) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(encoder.feature_shape[-1], embed)
        self.embedding = nn.Embedding(vocab_size, embed)
        self.lstm = nn.LSTM(embed, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocab_size)

    def forward(self, images: torch.Tensor, captions: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        with torch.no_grad():
            features = self.encoder(images)
        words = torch.cat([self.project(features).unsqueeze(1), self.embedding(captions)], dim=1)
        hidden, _ = self.lstm(pack_padded_sequence(words, lengths, batch_first=True))
        return self.output(hidden.data)


def train_epoch(model: Captioner, dataset: CaptionPerPicture, batch_size: int, workers: int) -> None:
    """Train on each caption once."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate, num_workers=workers)
    device = model.output.weight.device
    for images, captions, lengths in loader:
        images, captions = images.to(device), captions.to(device)
        targets = pack_padded_sequence(captions, lengths, batch_first=True).data
        loss = nn.functional.cross_entropy(model(images, captions, lengths), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
