"""A folder for the Hugging Face hub from a finished run, and its upload with your own login.

    python logs/tools/publish.py logs/ID.txt --out hub/ID                          the folder
    python logs/tools/publish.py logs/ID.txt --out hub/ID --upload USER/NAME       and its upload

The folder holds train_gpt.py, model.artifact, tokenizer.model, generate.py, requirements.txt,
train.log and README.md, the model card: its numbers are those of the log, its example text is
generated in the folder itself. The upload needs `pip install huggingface_hub` and `hf auth login`;
the repository is private unless --public is given.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from report import COUNT_FORMAT, DASH, ReportError, integer, parse_log, plain_output

ROOT = Path(__file__).resolve().parents[2]
CARD = """---
license: {license}
pipeline_tag: text-generation
tags: [parameter-golf, gated-deltanet, sliding-window-attention]
---
# {name}

A language model of {parameters} parameters in {model_bytes} bytes, made by `train_gpt.py` for
OpenAI's Parameter Golf challenge: {layers}. It is small and knows little: it was trained to
predict text, not to answer questions.

| | |
|---|---|
| bits per byte | **{bpb}** by `{method}` on {tokens} tokens, {bytes} bytes |
| loss | {val_loss} nats a token |
| trained on | `{data}`: {steps} steps, {train_s} s on {hardware} |
| artifact | {model_bytes} bytes, {bits} bits a weight; {total_bytes} with the script |
| checks of the run | {verdict} |
| script | commit {commit}, SHA-256 `{sha256}` |

The score is that of one run, `train.log`. It says nothing about other text{method_note}.

## Use it

```bash
pip install -r requirements.txt
python generate.py model.artifact "{prompt}"
```

gives, with the temperature 0.7 and seed 1337:

> {example}

The score again, from the artifact alone:

```bash
{score_command}
```

`train_gpt.load_artifact("model.artifact")` returns the model, a `torch.nn.Module`; nothing in the
file is executed.
"""


def sha256(path):
    """The hexadecimal digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_parts(args):
    """(RunLog, artifact, tokenizer, script), each checked against the log."""
    log = parse_log(args.log)
    if not (log.ours and log.finished):
        raise ReportError(f"{args.log}: not the log of a finished run of train_gpt.py")
    artifact = Path(args.artifact or log.path.with_suffix(".artifact"))
    tokenizer = Path(args.tokenizer or log.config.get(
        "tokenizer_path", "data/tokenizers/fineweb_1024_bpe.model"))
    script = Path(args.script or ROOT / "train_gpt.py")
    for option, path in (("--artifact", artifact), ("--tokenizer", tokenizer),
                         ("--script", script)):
        if not path.is_file():
            raise ReportError(f"{path}: no such file; give {option} FILE")
    if artifact.stat().st_size != log.model_bytes:
        raise ReportError(f"{artifact}: {artifact.stat().st_size} bytes, but the log says "
                          f"{log.model_bytes}; give the run's own with --artifact FILE")
    if sha256(script) != log.run["code_sha256"]:
        commit = log.run.get("commit", "unknown")
        raise ReportError(f"{script}: not the script of the run; get it with `git show "
                          f"{commit}:train_gpt.py > FILE` and give --script FILE")
    return log, artifact, tokenizer, script


def example_text(folder, prompt):
    """What the folder's own generate.py prints, in a process that sees only the folder."""
    command = [sys.executable, "generate.py", "model.artifact", prompt, "--tokens", "60"]
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    env |= dict(DEVICE="cpu", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8",
                          timeout=600)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ReportError(f"{folder}: its generate.py failed: {last}")
    return done.stdout.strip()


def card(log, name, license, prompt, example):
    """The text of the model card."""
    def told(value, form="{}"):
        return DASH if value is None else form.format(value)

    final = log.final
    vocab = log.config.get("vocab_size")
    settings = ["ARTIFACT=model.artifact", "DATA_PATH=FOLDER", "TOKENIZER_PATH=tokenizer.model"]
    settings += [f"VOCAB_SIZE={vocab}"] if vocab else []
    settings += [f"{k.upper()}={v}" for k, v in log.config.items()
                 if k == "final_score" or k.startswith(("ttt_", "eval_"))]
    note = ", and with `ttt` the model was trained on text that it had already scored"
    return CARD.format(
        name=name, license=license, prompt=prompt, example=example.replace("\n", "\n> "),
        parameters=told(integer(log.last("model").get("parameters")), COUNT_FORMAT),
        model_bytes=told(log.model_bytes, COUNT_FORMAT),
        total_bytes=told(log.total_bytes, COUNT_FORMAT),
        layers="`STACK=" + log.config.get("stack", "gdn*5 swa:a gdn*5 swa:a") + "`",
        bpb=f"{final.bpb:.4f}", val_loss=f"{final.val_loss:.4f}", method=final.method,
        method_note=note if final.method == "ttt" else "",
        tokens=told(final.tokens, COUNT_FORMAT), bytes=told(final.num_bytes, COUNT_FORMAT),
        data=Path(log.config.get("data_path", "fineweb10B_sp1024")).name,
        steps=told(log.steps, COUNT_FORMAT), train_s=told(log.train_s, "{:.0f}"),
        hardware=log.hardware, verdict=log.verdict, commit=log.run.get("commit", "unknown"),
        bits=log.last("quantized").get("bits_per_weight", DASH), sha256=log.run["code_sha256"],
        score_command=" ".join([*settings, "python train_gpt.py"]))


def prepare(args):
    """Write the folder; returns the paths of its files. It may not exist yet, or be empty."""
    log, artifact, tokenizer, script = find_parts(args)
    folder = Path(args.out)
    if folder.exists() and any(folder.iterdir()):
        raise ReportError(f"{folder}: is not empty; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in ((script, "train_gpt.py"), (artifact, "model.artifact"),
                         (tokenizer, "tokenizer.model"), (log.path, "train.log"),
                         (Path(__file__).with_name("generate.py"), "generate.py"),
                         (ROOT / "requirements.txt", "requirements.txt")):
        shutil.copyfile(source, folder / name)
    name = args.upload.split("/")[1] if args.upload else log.path.stem
    example = example_text(folder, args.prompt)
    text = card(log, name, args.license, args.prompt, example)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return sorted(folder.iterdir())


def upload(folder, repo, public):
    """Send the folder to the hub with the login of this machine's user; returns the address."""
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ReportError("--upload needs `pip install huggingface_hub`") from None
    if not get_token():
        raise ReportError("--upload: no login; run `hf auth login` first")
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        sent = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a run")
    except (HfHubHTTPError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise ReportError(f"--upload {repo}: {told}; the folder {folder} is ready, the same "
                          f"can be done by `hf upload {repo} {folder}`") from None
    return sent.commit_url


def main(argv=None):
    """The command line; returns the exit code: 0, or 2 for bad input."""
    plain_output()
    p = argparse.ArgumentParser(prog="publish.py", description="A folder for the Hugging Face hub "
                                "from a finished run, and its upload with your own login.")
    p.add_argument("log", metavar="LOG", help="log of the run, its artifact beside it")
    p.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    p.add_argument("--artifact", metavar="FILE", help="default: the log's name with .artifact")
    p.add_argument("--tokenizer", metavar="FILE", help="default: the log's TOKENIZER_PATH")
    p.add_argument("--script", metavar="FILE", help="default: train_gpt.py of this project")
    p.add_argument("--license", default="mit", help="of the weights, a name that the hub knows")
    p.add_argument("--prompt", default="The mayor", help="text that the example continues")
    p.add_argument("--upload", metavar="USER/NAME", help="send the folder to this repository")
    p.add_argument("--public", action="store_true", help="a new repository that all can read")
    args = p.parse_args(argv)
    try:
        if args.upload and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.upload):
            raise ReportError(f"--upload {args.upload}: expected USER/NAME")
        if re.search(r'["`$\\\n]', args.prompt):
            raise ReportError("--prompt: quotes, $ and \\ would break the card's command")
        for path in prepare(args):
            print(f"{path.stat().st_size:12,} {path}")
        if args.upload:
            print(upload(args.out, args.upload, args.public))
    except (ReportError, OSError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
