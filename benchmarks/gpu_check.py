"""Everything that needs a GPU, in one go: correctness first, then speed and memory, written down.

    python benchmarks/gpu_check.py                                         # tests, then a random 0.5B model
    python benchmarks/gpu_check.py --model Qwen/Qwen2.5-0.5B-Instruct      # a directory or hub id
    python benchmarks/gpu_check.py --device cpu --small                    # rehearsal without a GPU

1 correctness   pytest -m gpu: scores, gradients, replies against the CPU's, bf16, RL runs, a GPU in the sandbox
2 generation    tokens per second of generate.Generator against transformers' generate (bench_generate.py)
3 training      tokens per second and peak memory of forward and backward of token logprobs (plain bf16 weights)
                against transformers' model with the same loss written plainly, same rows
4 tiny          configs/tiny.yaml's RL phase, two steps, when runs/tiny is there: seconds by phase

Speed is not measured when correctness failed. Writes benchmarks/results/gpu.json (all figures, the device, versions)
and prints a summary. Exit code 1 when anything failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import ModelConfig, pack_rows
from weights import build_model, find_checkpoint, load_model, save_model

ROOT = Path(__file__).resolve().parent.parent
HALF_B = ModelConfig(
    "qwen2", 151_936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True, eos_ids=(151_645,), rope_theta=1e6
)
SMALL = ModelConfig("qwen2", 1024, 128, 384, 4, 4, 2, 32, tie_word_embeddings=True, eos_ids=(2,))


def check(device: str) -> dict:
    """The GPU tests in a process of their own."""
    env = os.environ | {"ML_AGENT_TEST_DEVICE": device}
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    lines = done.stdout.strip().splitlines()
    # 5 is pytest's "nothing ran": on a machine with no GPU that is not a success either.
    return {"ok": done.returncode == 0, "summary": lines[-1] if lines else f"exit code {done.returncode}"}


def generation(args, path: Path) -> list[str]:
    words = [sys.executable, "benchmarks/bench_generate.py", "--model", str(path), "--device", args.device]
    words += ["--dtype", "bfloat16" if args.device == "cuda" else "float32"]
    small, large = "--prompts 16 --batch 8 --repeats 1", "--prompts 256 --batch 128 --new 256"
    words += (small if args.small else large).split()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr[-2000:], flush=True)
    return done.stdout.strip().splitlines() if done.returncode == 0 else [f"failed: {done.stderr.strip()[-300:]}"]


def timed(update, repeats: int, device: str) -> tuple[float, float]:
    """(seconds of the fastest update, peak GiB of device memory); one update before counts for nothing."""
    update()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        update()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def training(args, path: Path) -> dict:
    """Rows of a prompt with one action each, as an RL update sees them."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    prompt, action, rows = (64, 16, 4) if args.small else (1536, 512, 8)
    ids = torch.randint(3, 1000, (rows, prompt + action), generator=torch.Generator().manual_seed(0))
    results = {"rows": rows, "prompt": prompt, "action": action, "dtype": str(dtype)}
    kinds = (("ours", ours(path, dtype, args.device, False)), ("recomputed", ours(path, dtype, args.device, True)))
    for name, make in (*kinds, ("transformers", theirs(path, dtype, args.device))):
        seconds, peak = timed(make(ids, prompt), 3, args.device)  # the model is freed before the next is made
        results[name] = {"tokens_per_s": ids.numel() / seconds, "peak_gib": peak}
    results["ratio"] = results["ours"]["tokens_per_s"] / results["transformers"]["tokens_per_s"]
    print(json.dumps(results, indent=1), flush=True)
    return results


def ours(path: Path, dtype, device: str, recompute: bool):
    """A maker of updates with our model; `recompute`: activations are recomputed block by block."""

    def make(ids, prompt: int):
        model = load_model(path, dtype, device)
        model.checkpoint_blocks = recompute
        rows = pack_rows([r[:prompt] for r in ids.tolist()], [[r[prompt:]] for r in ids.tolist()]).to(device)

        def update():
            logp, _ = model(rows.tokens, rows.positions, rows.mask, source_pos=rows.source_pos,
                            targets=rows.targets, target_mask=rows.target_mask)  # fmt: skip
            logp.mean().backward()
            model.zero_grad()

        return update

    return make


def theirs(path: Path, dtype, device: str):
    """The same loss, written plainly, with transformers' model."""
    from transformers import AutoModelForCausalLM

    def make(ids, prompt: int):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        tokens = ids.to(device)

        def update():
            logits = model(tokens, use_cache=False).logits[:, prompt - 1 : -1].float()
            logp = torch.log_softmax(logits, -1).gather(-1, tokens[:, prompt:, None])[..., 0]
            logp.mean().backward()
            model.zero_grad()

        return update

    return make


def tiny() -> dict | str:
    """Two RL steps of the demo where its fine-tuned model and states are at hand."""
    if not (ROOT / "runs" / "tiny" / "sft" / "config.json").is_file():
        return "skipped: runs/tiny/sft is not here (make collect sft, or carry runs/)"
    words = [sys.executable, "train_rl.py", "--config", "configs/tiny.yaml", "steps=2", f"out=gpu_check_{os.getpid()}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(ROOT / "runs" / "tiny" / f"gpu_check_{os.getpid()}", ignore_errors=True)
    print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
    found = re.findall(r"^step .*$", done.stdout, re.M)
    return {"steps": found} if done.returncode == 0 else f"failed: {done.stderr.strip()[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id; default: random weights in the shape of Qwen2.5-0.5B")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check.py: no CUDA device here; --device cpu --small rehearses it", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    report = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    report["model"] = args.model or ("random, small" if args.small else "random, shape of Qwen2.5-0.5B")
    report["correctness"] = check(args.device)
    if report["correctness"]["ok"]:
        with tempfile.TemporaryDirectory() as folder:
            if args.model is None:
                save_model(build_model(SMALL if args.small else HALF_B, seed=0), folder)
            path = find_checkpoint(args.model or folder)
            report["generation"] = generation(args, path)
            report["training"] = training(args, path)
        report["tiny"] = tiny()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{name}: {report['correctness']['summary']}; wrote {args.out}")
    return 0 if report["correctness"]["ok"] and '"failed: ' not in json.dumps(report) else 1


if __name__ == "__main__":
    sys.exit(main())
