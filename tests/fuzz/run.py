"""Looks for files that a reader neither reads nor refuses in one line: python tests/fuzz/run.py pickle --minutes=10

Guided by coverage with atheris (pip install atheris) where it is installed; else by the lines of the readers that a
file reaches first. Each finding is written to the folder of --findings, and the exit code is then 1. Not run by pytest.
"""

import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
KINDS = {
    "pickle": ["pickle"],
    "safetensors": ["safetensors", "header", "detector"],
    "dataset": [
        "zip",
        "labels",
        "image",
        "reference",
        "images",
        "idx",
        "cifar10",
        "state",
        "array",
        "batch",
        "state's pickle",
    ],
}
WATCHED = ["torch_utils", "edm", "training", "dnnlib", "PIL"]
MAX_FILE_BYTES = 1 << 16
MAX_MEMORY_MB = 4096
MAX_SECONDS = 25  # of one file


@click.command()
@click.argument("what", type=click.Choice(list(KINDS)))
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True)
@click.option("--seed", type=click.IntRange(1), default=1, show_default=True)
@click.option("--findings", type=click.Path(file_okay=False, path_type=Path), default=Path("fuzz-findings"))
@click.option("--plain", is_flag=True, help="Without atheris even if it is there")
def main(what: str, minutes: float, seed: int, findings: Path, plain: bool) -> None:
    """Mutate good files of one kind and read them."""
    findings.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ImportError):
        import atheris
    guided = "atheris" in sys.modules and not plain
    watch = atheris.instrument_imports(include=WATCHED) if guided else contextlib.nullcontext()
    import torch  # first and unwatched: it is no reader

    torch.set_num_threads(1)
    with watch:
        import hostile
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        read, seeds = target(hostile, KINDS[what], folder)
        if guided:
            run_atheris(atheris, read, seeds, folder, minutes, seed, findings / f"{what}-")
        else:
            run_plain(read, seeds, minutes, seed, findings / what)


def target(hostile, kinds: list[str], folder: Path) -> tuple[Callable[[bytes], str], list[bytes]]:
    """(reads a file, good files). The first byte of a file says which reader it goes to."""
    readers = [hostile.readers(folder)[kind] for kind in kinds]
    hostile.write_images(folder)
    seeds = [bytes([i]) + good for i, reader in enumerate(readers) for good in reader.good]

    def read(data: bytes) -> str:
        if not data:
            return ""
        reader = readers[data[0] % len(readers)]
        name = reader.suffix if reader.suffix.startswith("dataset") else f"x{reader.suffix}"
        return hostile.outcome(reader, folder / name, data[1:])

    return read, [seed for seed in seeds if len(seed) <= MAX_FILE_BYTES]


def run_atheris(atheris, read, seeds, folder: Path, minutes: float, seed: int, prefix: Path) -> None:
    """Ends the process: libFuzzer's loop doesn't return."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, data in enumerate(seeds):
        (corpus / f"seed{i}").write_bytes(data)
    options = {"max_total_time": round(minutes * 60), "seed": seed, "artifact_prefix": prefix, "print_final_stats": 1}
    options |= {"max_len": MAX_FILE_BYTES, "rss_limit_mb": MAX_MEMORY_MB, "timeout": MAX_SECONDS, "verbosity": 1}
    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)], read)
    atheris.Fuzz()


def run_plain(read, seeds, minutes: float, seed: int, prefix: Path) -> None:
    """Keeps every damaged file that reaches a line of the readers, or a refusal, that none before it reached."""
    from hostile import mutate

    rng, corpus, reached, executions, found = random.Random(seed), list(seeds), set(), 0, 0
    start = time.monotonic()
    while time.monotonic() - start < minutes * 60:
        data = mutate(rng, rng.choice(corpus), rng.choice(corpus))[:MAX_FILE_BYTES]
        executions += 1
        lines: set = set()
        sys.settrace(tracer(lines))
        try:
            read(data)
        except Exception as error:
            found += 1
            Path(f"{prefix}-{found}").write_bytes(data)
            click.echo(f"{prefix}-{found}: {type(error).__name__}: {error}")
        finally:
            sys.settrace(None)
        if not lines <= reached:
            reached |= lines
            corpus.append(data)
    rate = executions / (time.monotonic() - start)
    click.echo(f"{executions} executions, {rate:.0f} per second, {len(reached)} lines, corpus {len(corpus)}")
    click.echo(f"findings: {found}")
    sys.exit(found > 0)


def tracer(lines: set):
    """A trace function that notes (file, line) within this project."""
    watched = tuple(str(ROOT / name) for name in ("torch_utils", "edm", "training"))

    def trace(frame, event, _argument):
        if not frame.f_code.co_filename.startswith(watched):
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    return trace


if __name__ == "__main__":
    main()
