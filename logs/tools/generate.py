"""Continues a text with the model of an artifact, token by token, from carried state.

    python logs/tools/generate.py ARTIFACT "text" [--tokens 100] [--temperature 0.7] [--seed 1337]

ARTIFACT is an artifact file of train_gpt.py. Its tokenizer is TOKENIZER_PATH; without it
tokenizer.model beside the artifact, or the one that the run's log names.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import torch

# Behind the script's own folder: in one made by publish.py, train_gpt.py stands beside this file.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

import train_gpt as t  # noqa: E402


@torch.no_grad()
def generate(model, ids, count, temperature, rng):
    """Yield `count` more tokens after ids (1, T), each an int; temperature 0: the likeliest."""
    state = None
    for _ in range(count):
        logits, state = model(ids, state)
        logits = logits[:, -1].double()
        if temperature:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)
        else:
            ids = logits.argmax(-1, keepdim=True)
        yield int(ids)


def continuation(model, sp, text, count, temperature, seed):
    """Yield pieces of text: `text` itself, then what each further token adds.

    It ends early at a control token, such as the beginning of another document.
    """
    start = [model.cfg.bos_id] if model.cfg.bos_id >= 0 else []
    ids = sp.encode(text)
    if not start + ids:
        raise t.GolfError("the text is empty, and the model has no BOS_ID to begin with")
    device = next(model.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    prompt = torch.tensor([start + ids], device=device)
    shown = sp.decode(ids)
    yield shown
    for token in generate(model, prompt, count, temperature, rng):
        if sp.is_control(token):
            return
        ids.append(token)
        decoded = sp.decode(ids)
        if not decoded.endswith("\ufffd"):  # a character of several byte tokens is not whole yet
            yield decoded[len(shown):]
            shown = decoded


def tokenizer_of(artifact):
    """{"TOKENIZER_PATH": path} as far as the files beside the artifact say, else {}."""
    artifact = Path(artifact)
    log = artifact.with_suffix(".txt")
    if (beside := artifact.with_name("tokenizer.model")).is_file():
        return {"TOKENIZER_PATH": str(beside)}
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    found = re.search(r"^settings .*\btokenizer_path:(\S+)", text, re.MULTILINE)
    return {"TOKENIZER_PATH": found[1]} if found else {}


def main(argv=None):
    """The command line; returns the exit code."""
    p = argparse.ArgumentParser(prog="generate.py", description="Continues a text.")
    p.add_argument("artifact", help="artifact file of train_gpt.py")
    p.add_argument("text", help="what is to be continued")
    p.add_argument("--tokens", type=int, default=100, help="length of the continuation")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    p.add_argument("--seed", type=int, default=1337)
    args = p.parse_args(argv)
    try:
        _, header, _ = t.read_artifact(args.artifact)
        pieces = {"VOCAB_SIZE": str(header["config"]["vocab_size"])}  # the default paths follow it
        cfg = t.Config.from_env(pieces | tokenizer_of(args.artifact) | dict(os.environ))
        on_gpu = torch.cuda.is_available() and cfg.device != "cpu"
        # The plain operations: one token at a time is no work for the fast ones.
        device = "cuda" if on_gpu else "cpu"
        model = t.load_artifact(args.artifact, device=device, base=cfg)
        sp = t.open_tokenizer(model.cfg)
        for piece in continuation(model, sp, args.text, args.tokens, args.temperature, args.seed):
            print(piece, end="", flush=True)
    except (t.GolfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
