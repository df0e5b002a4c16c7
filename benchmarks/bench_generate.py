"""Tokens per second of generate.Generator, as a multiple of transformers' generate: same weights, prompts and lengths.

    python benchmarks/bench_generate.py                                       # the tiny model, CPU, about a minute
    python benchmarks/bench_generate.py --prompts 256 --batch 256
    python benchmarks/bench_generate.py --model Qwen/Qwen2.5-0.5B-Instruct --device cuda --dtype bfloat16

Prompts have random ids and lengths. `full`: every reply runs to --new tokens. `ragged`: replies end anywhere up to
there, as those of a trained model do; a batch of transformers waits for its longest, continuous batching does not.
The two take turns in the same process and the best of --repeats counts. On a busy machine trust the ratio of CPU
seconds, with --threads 1.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from generate import Generator, Rng
from model import ModelConfig
from weights import build_model, find_checkpoint, load_model, save_model

TINY = ModelConfig("llama", 1024, 128, 384, 4, 4, 4, 32, tie_word_embeddings=True)


def ours(model, prompts, args, eos) -> int:
    """Sampled tokens."""
    longest = max(map(len, prompts)) + args.new
    generator = Generator(model, eos, max_batch=args.batch, max_len=longest)
    return sum(len(c.tokens) for c in generator.stream(prompts, args.new, rng=Rng(0, 0)))


def theirs(model, prompts, args, eos) -> int:
    """The same with transformers: left padding, --batch prompts at a time, prompts of like length together."""
    sampled = 0
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), args.batch):
        batch = prompts[start : start + args.batch]
        longest = max(map(len, batch))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=args.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=args.device)
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=args.new,
            min_new_tokens=None if eos else args.new,
            do_sample=True,
            top_k=0,
            eos_token_id=eos or None,
            pad_token_id=0,
        )[:, longest:]
        stops = torch.isin(out, torch.tensor(eos, dtype=torch.long, device=out.device)).int()
        sampled += int((stops.cumsum(1) - stops == 0).sum())  # up to the first end, which counts
    return sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id; default: a random model as configs/tiny.yaml makes")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="sequences that decode together")
    parser.add_argument("--lengths", type=int, nargs=2, default=(200, 400), metavar=("MIN", "MAX"), help="of prompts")
    parser.add_argument("--new", type=int, default=60, help="tokens per reply, at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)

    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            save_model(build_model(TINY, seed=0), folder)
        path = find_checkpoint(args.model or folder)
        model = load_model(path, dtype, args.device)
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device).eval()

    rng = random.Random(0)
    vocab = range(1, model.config.vocab_size)
    prompts = [rng.choices(vocab, k=rng.randint(*args.lengths)) for _ in range(args.prompts)]
    few = max(1, round(model.config.vocab_size / args.new * 2))  # a random model then stops after about new / 2
    print(f"{args.prompts} prompts of {args.lengths[0]}-{args.lengths[1]} tokens, {args.new} new, batch {args.batch}, "
          f"{args.device}, {args.dtype}, {args.threads} threads, torch {torch.__version__}")
    for name, eos in (("full", []), ("ragged", list(range(1, 1 + few)))):
        wall, cpu = {ours: 0.0, theirs: 0.0}, {ours: 0.0, theirs: 0.0}  # tokens per second, the best so far
        for _ in range(args.repeats):
            for function, net in ((ours, model), (theirs, reference)):
                start = time.perf_counter(), time.process_time()
                sampled = function(net, prompts, args, eos)  # counting the tokens waits for the device
                wall[function] = max(wall[function], sampled / (time.perf_counter() - start[0]))
                cpu[function] = max(cpu[function], sampled / (time.process_time() - start[1]))
        for clock, speed in (("second", wall), ("CPU second", cpu)):
            print(f"{name:7}ours {speed[ours]:7.0f}   transformers {speed[theirs]:7.0f}   tokens per {clock:10}   "
                  f"ratio {speed[ours] / speed[theirs]:.2f}", flush=True)


if __name__ == "__main__":
    main()
