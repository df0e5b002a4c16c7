"""Hugging Face checkpoints in and out, and what a model from scratch starts with: weights and a tokenizer.

    model = load_model("Qwen/Qwen2.5-0.5B-Instruct")            # a directory or a hub id
    critic = load_value_model("runs/tiny/sft")                  # the same trunk, a head that is zero
    save_model(model, "out", tokenizer=tokenizer)               # transformers' from_pretrained loads it as it is

A sharded model is loaded without a whole copy on any rank: `shard` is applied while it has no storage, then each
rank reads its own rows of the safetensors files. dist.py gathers whole parameters for saving.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from model import ModelConfig, Transformer, ValueModel

MAX_FILE_BYTES = 5 * 10**9  # a larger checkpoint is split into several files


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """A fresh fp32 model with weights from normal(0, 0.02), those of the two projections into the residual stream
    scaled down by the root of their number (GPT-2), so that depth does not blow it up. Equal seeds, equal bits."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


def init_empty(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model without storage (meta device): shard it, call `to_empty(device=...)`, then `load_weights`."""
    with torch.device("meta"):
        return Transformer(config).to(dtype)


def hf_name(name: str) -> str:
    """Name of a parameter in a Hugging Face checkpoint: embed.weight -> model.embed_tokens.weight."""
    name = name.removeprefix("trunk.")
    if name.startswith(("lm_head.", "value_head.")):
        return name
    return "model." + name.replace("embed.", "embed_tokens.", 1)


def find_checkpoint(path: str | Path) -> Path:
    """A local directory as it is; a hub id ("owner/name") is downloaded. ValueError when it is neither."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json: give a directory of save_model or transformers")
        return Path(path)
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise ValueError(f"{path} is neither a directory nor a hub id like Qwen/Qwen2.5-0.5B-Instruct")
    from huggingface_hub import snapshot_download  # only needed for hub ids

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # of the hub or the network, of many types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not downloaded ({reason}): check the name, or the network") from None


def load_tokenizer(path: str | Path):
    """The tokenizer of a directory or hub id, as transformers loads it.

    Raises ValueError when there is none, or none with a chat template: every prompt here is a chat.
    """
    from transformers import AutoTokenizer  # only needed where there is text

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: no tokenizer ({reason}): check the name, or the network") from None
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: the tokenizer has no chat template: give an instruct model")
    return tokenizer


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint, with the end-of-sequence ids of generation_config.json added."""
    path = find_checkpoint(path)
    config = ModelConfig.from_hf(json.loads((path / "config.json").read_text()))
    extra = path / "generation_config.json"
    more = json.loads(extra.read_text()).get("eos_token_id") if extra.is_file() else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return replace(config, eos_ids=tuple(dict.fromkeys([*config.eos_ids, *more])))


def stored_tensors(path: Path) -> dict[str, Callable]:
    """{name: function that opens the tensor as a slice} of a checkpoint, in one file or several; a critic's head
    has the names value_head.weight and .bias. Nothing is read yet."""
    head = path / "value_head.safetensors"
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no model*.safetensors (of .bin files, transformers makes some)")
    tensors = {}
    for file in (*files, *([head] if head.is_file() else [])):
        opened = safe_open(file, "pt")  # memory-mapped
        prefix = "value_head." if file == head else ""
        tensors |= {prefix + name: partial(opened.get_slice, name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@torch.no_grad()
def load_weights(model: Transformer | ValueModel, path: str | Path) -> None:
    """Fill a model from a checkpoint; of a sharded (DTensor) parameter only this rank's rows are read.

    The head of a ValueModel is zero where the checkpoint is a plain language model's.
    Raises ValueError naming the first tensor that is missing, misshapen, or without a place here.
    """
    tensors = stored_tensors(find_checkpoint(path))
    for name, parameter in model.named_parameters():
        hf = hf_name(name)
        if hf not in tensors:
            if not hf.startswith("value_head."):
                raise ValueError(f"{path}: the checkpoint has no tensor {hf}")
            parameter.zero_()
            continue
        stored = tensors.pop(hf)()
        if list(stored.get_shape()) != list(parameter.shape):
            raise ValueError(f"{path}: {hf} has shape {stored.get_shape()}, expected {list(parameter.shape)}")
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            first = shard_offset(parameter)
            local.copy_(stored[first : first + local.shape[0]])
        else:
            parameter.copy_(stored[:])
    for hf in tensors:  # what is left: copies of tied heads, and buffers of old checkpoints
        if hf != "lm_head.weight" and not hf.startswith("value_head.") and not hf.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{path}: this decoder has no place for the tensor {hf}")


def shard_offset(parameter: DTensor) -> int:
    """First row of this rank's slice; fully_shard splits dimension 0 into equal chunks, the last ones shorter."""
    assert parameter.device_mesh.ndim == 1 and parameter.placements[0].is_shard(0)
    chunk = -(-parameter.shape[0] // parameter.device_mesh.size())
    return min(chunk * parameter.device_mesh.get_local_rank(), parameter.shape[0])


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device="cpu", shard: Callable = lambda model: model
) -> Transformer:
    """The model of a Hugging Face directory or hub id.

    shard(model) -> model is applied while the model has no storage yet (dist.shard): then each rank allocates and reads
    its own slices only, never a whole copy.

    Raises ValueError for a path that is neither, a feature that is not covered, and as load_weights does.
    """
    path = find_checkpoint(path)
    model = shard(init_empty(read_config(path), dtype)).to_empty(device=device)
    load_weights(model, path)
    return model


def load_value_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device="cpu", shard: Callable = lambda model: model
) -> ValueModel:
    """A critic: what save_value_model wrote, or a plain model's trunk with a head that is zero. `shard` as above."""
    path = find_checkpoint(path)
    critic = shard(ValueModel(init_empty(read_config(path), dtype))).to_empty(device=device)
    load_weights(critic, path)
    return critic


def save_model(model: Transformer, path: str | Path, state_dict: dict | None = None, tokenizer=None) -> None:
    """Write a directory that transformers' from_pretrained loads: config.json, model*.safetensors, tokenizer.

    state_dict: the whole parameters on the CPU, when `model` itself is sharded (dist.full_state_dict).
    config.json comes last: a directory that has none was cut short and does not load.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for stale in (path / "config.json", *path.glob("model*.safetensors*")):
        stale.unlink(missing_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {hf_name(name): tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    files: list[dict] = [{}]
    for name, tensor in tensors.items():  # a new file whenever the next tensor would make this one too large
        held = sum(t.nbytes for t in files[-1].values())
        if held and held + tensor.nbytes > MAX_FILE_BYTES:
            files.append({})
        files[-1][name] = tensor
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        weight_map = {name: file for file, part in zip(names, files) for name in part}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file, part in zip(names, files):
        save_file(part, path / file, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps(model.config.to_hf() | {"torch_dtype": dtype}, indent=1))


def save_value_model(critic: ValueModel, path: str | Path, state_dict: dict | None = None) -> None:
    """The trunk as save_model writes it, and value_head.safetensors."""
    state = critic.state_dict() if state_dict is None else state_dict
    head = {name: state[f"value_head.{name}"].detach().contiguous().cpu() for name in ("weight", "bias")}
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file(head, Path(path) / "value_head.safetensors")
    save_model(critic.trunk, path, {name: t for name, t in state.items() if name.startswith("trunk.")})


# ------------------------------------------------------------------------ a tokenizer of our own

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A word, one digit, newlines, punctuation, indentation: merges stay within one of them.
WORDS = r" ?\p{L}+|\p{N}|\n+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int, special: tuple[str, ...] = SPECIAL):
    """A byte-level BPE tokenizer for a model from scratch, as transformers' PreTrainedTokenizerFast.

    Digits stay single and no merge crosses words, so that line numbers and names have one spelling. The chat
    template is ChatML; the last special token ends a reply, the first one pads. Any text round-trips, and the same
    texts give the same tokenizer. Saved beside a model, it reads back the same for the families llama and qwen3;
    for qwen2, transformers 5 cuts words by a rule of its own.

    Raises ValueError when vocab_size leaves no room for the 256 bytes and the special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size {vocab_size} is below 256 bytes + {len(special)} special tokens")
    bpe = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[-1], pad_token=special[0])
    tokenizer.chat_template = CHATML
    return tokenizer
