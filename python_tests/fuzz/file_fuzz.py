"""Damaged files, without end: each is read right, or refused by one error that names it.

    python python_tests/fuzz/file_fuzz.py                     1000 files, from where the record ends
    python python_tests/fuzz/file_fuzz.py --files 200 --from 0
    python python_tests/fuzz/file_fuzz.py --repeat 4711       one file, with its traceback

A seed makes a file: it picks a reader of `READERS`, copies what the reader takes when it is whole,
and damages a file of it: bits are flipped, bytes cut, spliced, zeroed or filled, sizes replaced by
huge ones, JSON given other values, a link or a file of another kind put in its place. Manifests are
made again half of the time, so that they call the damage whole.

"right" is what the whole file gives; "other" is other content where a format has no sums by which
the damage could be known, and is bad for those that have. "refused" is a ValueError, TypeError,
OSError or RuntimeError that names the file. Everything else is bad: another error, one that does
not name the file, two readers of one file that disagree, memory above a bound, a crash, no end.
Files are read in a worker process, which is started anew after a crash or when it does not answer.

`file_fuzz.json` keeps the counts of all runs; the next run goes on from its last seed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from workers import Record, Worker, answers

HERE = Path(__file__).resolve().parent
COMMAND = "python python_tests/fuzz/file_fuzz.py --files N"
RECORD = Record(HERE / "file_fuzz.json", "files", {"command": COMMAND})
SECONDS = 20.0  # for one file, by the clock
MEMORY = 3 << 30  # of addresses, beyond what a worker takes to begin with
RESIDENT = 3 << 29  # of memory, likewise
CLEAR = (ValueError, TypeError, OSError, RuntimeError)
BAD = ("unnamed", "differs", "silent", "memory", "hang", "crash", "machine")


class Reader(NamedTuple):
    """One way of reading.

    Attributes:
        make: writes whole files into a folder.
        read: what they hold, from the folder; of several readings of one file all must agree.
        sums: the format has sums, so that no damage may come through as other numbers.
    """

    make: Callable[[Path], None]
    read: tuple[Callable[[Path], Any], ...]
    sums: bool = False


# ----------------------------------------------------------------------------- what is read, whole


def numbers(*shape: int) -> Any:
    import numpy as np

    return np.random.default_rng(7).integers(1, 255, shape, dtype=np.uint8)


def picture(name: str, shape: tuple[int, ...], kind: str, **options: Any) -> Reader:
    """A picture, as training and as denoising read it."""

    def make(folder: Path) -> None:
        from PIL import Image

        exif = Image.Exif()  # turned
        exif[0x0112] = 6
        if kind in ("PNG", "JPEG", "TIFF", "WEBP"):
            options.setdefault("exif", exif)
        Image.fromarray(numbers(*shape)).save(folder / name, kind, **options)

    def train(folder: Path) -> Any:
        from hos_ext.app import data

        return data.read_samples(f"folder:{folder}")[0].numpy()

    def pages(folder: Path) -> Any:
        from hos_ext.app.data import decode_pages

        (page,) = decode_pages((folder / name).read_bytes())
        return page

    def denoise(folder: Path) -> Any:
        from hos_ext.app import data, results

        try:
            like = pages(folder)
        except ValueError:
            like = numbers(1, 9, 7)
        scaling = data.Scaling(levels=256 if like.dtype == "uint8" else 0)
        raw = {"sigma": 0.1, "units": "raw"}
        x = results.read_files([folder / name], like.shape, scaling, **raw).x[0]
        back = x.double() * scaling.scale + scaling.shift
        return back.round().byte().numpy() if scaling.levels else back.float().numpy()

    return Reader(make, (train, denoise), sums=kind == "PNG")


def array(name: str, save: str) -> Reader:
    """An array, as training and as denoising read it."""

    def make(folder: Path) -> None:
        import numpy as np

        with (folder / name).open("wb") as file:
            getattr(np, save)(file, np.random.default_rng(7).normal(size=(60, 5)).astype("f4"))

    def train(folder: Path) -> Any:
        from hos_ext.app import data

        return data.read_samples(f"npy:{folder / name}").numpy().astype("f4")

    def denoise(folder: Path) -> Any:
        from hos_ext.app import data, results

        shape = (5,)
        raw = {"sigma": 0.1, "units": "raw"}
        found = results.read_files([folder / name], shape, data.Scaling(), **raw)
        return found.x.numpy()

    return Reader(make, (train, denoise), sums=save != "save")


def parquet(images: bool) -> Reader:
    """A table of pictures or of lists."""

    def make(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        rows: list[Any] = numbers(20, 6).astype("f4").tolist()
        column = pa.array(rows, pa.list_(pa.float32()))
        if images:
            encoded = []
            for each in numbers(20, 6, 5):
                file = io.BytesIO()
                Image.fromarray(each).save(file, "PNG")
                encoded.append({"bytes": file.getvalue(), "path": None})
            struct_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            column = pa.array(encoded, struct_)
        pq.write_table(pa.table({"x": column}), folder / "a.parquet", row_group_size=7)

    def read(folder: Path) -> Any:
        from hos_ext.app import data

        return data.read_samples(f"parquet:{folder / 'a.parquet'}").numpy()

    return Reader(make, (read,))


def make_run(folder: Path) -> None:
    from hos_ext.app import cli

    made = folder.parent / "info"
    if (made / "metrics.json").exists():
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return

    words = ["train", "--data", "density:gaussian2d", "--out", str(folder), "--steps", "2"]
    words += ["--model", "mlp", "--width", "8", "--head-width", "8", "--rank", "1", "--depth", "2"]
    words += ["--tracker", "none", "--batch-size", "8", "--force"]
    if cli.run(words):
        raise RuntimeError("file_fuzz: the run to be damaged was not made")
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for path in folder.glob("*.png"):
        path.unlink()


def make_model(folder: Path) -> None:
    import torch

    import hos_ext

    torch.manual_seed(0)
    hos_ext.save_model(hos_ext.MLP((3,), 1, width=8, head_width=8), folder, note=[1, 2])


def read_model(folder: Path) -> Any:
    import hos_ext

    model, config = hos_ext.load_model(folder)
    state = [value.numpy() for value in model.state_dict().values()]
    return [*state, json.dumps(config, sort_keys=True)]


def read_run(folder: Path) -> Any:
    from hos_ext.app import runs

    model, facts = runs.load_run(folder)
    state = [value.numpy() for value in model.state_dict().values()]
    return [*state, json.dumps(facts, sort_keys=True), repr(runs.scaling_of(facts))]


def make_run_model(folder: Path) -> None:
    make_run(folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name != "model":
            shutil.rmtree(path)


def read_info(folder: Path) -> Any:
    from hos_ext.app import runs

    return json.dumps(runs.info(folder), sort_keys=True)


def read_checkpoint(folder: Path) -> Any:
    """The state that training goes on from, or the warning that it cannot."""
    import torch
    from torch.optim import swa_utils

    from hos_ext.app import options
    from hos_ext.app.training import checkpoints

    whole = json.loads((folder / "whole.json").read_bytes())
    model = options.build_model(whole["options"], (2,))
    ema = swa_utils.AveragedModel(model)
    weights = list(model.parameters())
    groups = [[p for p in weights if p.dim() > 1], [p for p in weights if p.dim() <= 1]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        place = folder / "checkpoints"
        state = checkpoints.load_checkpoint(place, model, ema, optimizer, {})
    if state.kept is None:
        raise ValueError("; ".join(str(each.message) for each in said))
    found = [value.numpy() for value in model.state_dict().values()]
    return [*found, repr(state.history), repr(state.step), repr(state.sums)]


def make_checkpoint(folder: Path) -> None:
    make_run(folder)
    (folder / "run.json").rename(folder / "whole.json")
    shutil.rmtree(folder / "model")
    (folder / "metrics.json").unlink()


def config(name: str, text: str) -> Reader:
    def read(folder: Path) -> Any:
        from hos_ext.app import options

        return repr(options.read_config(folder / name))

    return Reader(lambda folder: (folder / name).write_text(text) and None, (read,))


READERS: dict[str, Reader] = {
    "png": picture("a.png", (9, 7), "PNG"),
    "png-rgb": picture("a.png", (9, 7, 3), "PNG"),
    "jpg": picture("a.jpg", (40, 24, 3), "JPEG"),
    "tif": picture("a.tif", (9, 7), "TIFF"),
    "tif-lzw": picture("a.tiff", (9, 7, 3), "TIFF", compression="tiff_lzw"),
    "bmp": picture("a.bmp", (9, 7, 3), "BMP"),
    "webp": picture("a.webp", (9, 7, 3), "WEBP", lossless=True),
    "ppm": picture("a.ppm", (9, 7, 3), "PPM"),
    "pgm": picture("a.pgm", (9, 7), "PPM"),
    "npy": array("a.npy", "save"),
    "npz": array("a.npz", "savez"),
    "npz-packed": array("a.npz", "savez_compressed"),
    "parquet-images": parquet(True),
    "parquet-lists": parquet(False),
    "model": Reader(make_model, (read_model,)),
    "info": Reader(make_run, (read_info,)),
    "run": Reader(make_run_model, (read_run,)),
    "checkpoint": Reader(make_checkpoint, (read_checkpoint,)),
    "json": config("a.json", '{"steps": 5, "sigma": [0.1, 1.2], "model": "mlp", "data": "digits"}'),
    "yaml": config("a.yaml", "steps: 5\nsigma: [0.1, 1.2]\nmodel: mlp\nlearning-rate: 1e-3\n"),
    "toml": config("a.toml", 'steps = 5\nsigma = [0.1, 1.2]\nmodel = "mlp"\ndata = "digits"\n'),
}

# ---------------------------------------------------------------------------------------- damage

HUGE = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
VALUES = (None, True, -1, 0, 1e308, 10**30, "", "../../x", "/etc/passwd", [], {}, [[1]], {"a": 1})


def flip(content: bytearray, rng: random.Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_head(content: bytearray, rng: random.Random, other: bytes) -> None:
    content[rng.randrange(min(96, len(content)))] = rng.randrange(256)


def cut(content: bytearray, rng: random.Random, other: bytes) -> None:
    del content[rng.randrange(len(content)) :]


def cut_middle(content: bytearray, rng: random.Random, other: bytes) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.randrange(1, 40)]


def grow(content: bytearray, rng: random.Random, other: bytes) -> None:
    content += rng.randbytes(rng.randrange(1, 300))


def splice(content: bytearray, rng: random.Random, other: bytes) -> None:
    start, size = rng.randrange(len(content)), rng.randrange(1, 200)
    source = other if rng.random() < 0.5 else bytes(content)
    from_ = rng.randrange(len(source))
    content[start : start + size] = source[from_ : from_ + size]


def fill(content: bytearray, rng: random.Random, other: bytes) -> None:
    start, size = rng.randrange(len(content)), rng.randrange(1, 64)
    some = content[start : start + size]
    content[start : start + size] = bytes([rng.choice((0, 255, 32))]) * len(some)


def huge(content: bytearray, rng: random.Random, other: bytes) -> None:
    """A size, of four or eight bytes in either order."""
    form = rng.choice(("<I", ">I", "<Q", ">Q"))
    value = rng.choice(HUGE) & (2 ** (8 * struct.calcsize(form)) - 1)
    start = rng.randrange(min(512, len(content)))
    content[start : start + struct.calcsize(form)] = struct.pack(form, value)


def digits(content: bytearray, rng: random.Random, other: bytes) -> None:
    """Another digit, as of a size that is written in letters."""
    places = [i for i, each in enumerate(content[:4096]) if 48 <= each <= 57]
    if places:
        at = rng.choice(places)
        content[at : at + 1] = rng.choice((b"9", b"-", b"0", b"99999999", b"1e9", b" "))


def edit(content: bytearray, rng: random.Random, other: bytes) -> None:
    """Another value somewhere in JSON, of a file or of the head of a .safetensors."""
    start, stop = 0, len(content)
    if content[8:9] == b"{":
        start, stop = 8, 8 + struct.unpack("<Q", content[:8])[0]
    try:
        value = json.loads(content[start:stop])
    except ValueError:
        return flip(content, rng, other)
    text = _edited(value, rng)
    if text is not None:
        content[start:stop] = text
        if start:
            content[:8] = struct.pack("<Q", len(text))
    return None


def _edited(value: Any, rng: random.Random) -> bytes | None:
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, each in items:
            places.append((node, key))
            if isinstance(each, (dict, list)):
                visit(each)

    if isinstance(value, (dict, list)):
        visit(value)
    if not places:
        return None
    configs = [(n, k) for n, k in places if isinstance(n[k], str) and n[k].startswith("{")]
    node, key = rng.choice(configs if configs and rng.random() < 0.7 else places)
    act = rng.random()
    if isinstance(node[key], str) and node[key].startswith("{"):  # a config in a string
        node[key] = (_edited(json.loads(node[key]), rng) or b"").decode()
    elif act < 0.15 and isinstance(node, dict):
        node[rng.choice(("../" + str(key), "other", ""))] = node.pop(key)
    elif act < 0.3:
        del node[key]
    else:
        node[key] = rng.choice((*VALUES, rng.choice(places)[0]) if act > 0.95 else VALUES)
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def nest(content: bytearray, rng: random.Random, other: bytes) -> None:
    """Brackets in brackets, deeper than a parser goes."""
    start = rng.randrange(len(content))
    content[start:start] = rng.choice((b"[", b'{"a":', b"(")) * rng.choice((50, 100_000))


DAMAGES = (nest, flip, flip, flip_head, cut, cut_middle, grow, splice, fill, huge, digits, edit)
PLACES = ("other kind", "empty", "link", "link to nothing", "link to itself", "folder", "gone")


def damage(folder: Path, corpus: Path, rng: random.Random) -> tuple[Path, str]:
    """Damages a file of a folder; which one, and how."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "whole.json")
    path = rng.choice(files)
    others = sorted(p for p in corpus.rglob("*") if p.is_file())
    other = rng.choice(others).read_bytes() or b"\0"
    if rng.random() < 0.12:
        how = rng.choice(PLACES)
        replace(path, how, other, corpus.parent)
    else:
        content, act = bytearray(path.read_bytes()), rng.choice(DAMAGES)
        if path.suffix in (".json", ".safetensors") and rng.random() < 0.5:
            act = edit
        act(content, rng, other)
        how = act.__name__
        path.write_bytes(content)
    manifest = path.parent / "manifest.json"
    if manifest.exists() and path != manifest and path.is_file() and rng.random() < 0.5:
        marks = json.loads(manifest.read_bytes())
        content = bytearray(path.read_bytes())
        digest = hashlib.sha256(content).hexdigest()
        marks[path.name] = {"bytes": len(content), "sha256": digest}
        manifest.write_text(json.dumps(marks))
        how += ", called whole"
    return path, how


def replace(path: Path, how: str, other: bytes, outside: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "other kind":
        path.write_bytes(other)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "link":  # out of the folder, to what was there
        (outside / "outside").write_bytes(content)
        path.symlink_to(outside / "outside")
    elif how == "link to nothing":
        path.symlink_to(outside / "nothing")
    elif how == "link to itself":
        path.symlink_to(path)
    elif how == "folder":
        path.mkdir()


# ----------------------------------------------------------------------------------- the judgement


class Case(NamedTuple):
    """What a seed makes."""

    reader: str
    path: Path
    how: str


def make_case(seed: int, place: Path) -> Case:
    """Writes the damaged file of a seed into place/case."""
    rng = random.Random(seed)
    name = rng.choice(list(READERS))
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "corpus" / name, folder)
    path, how = damage(folder, place / "corpus", rng)
    return Case(name, path, how)


def same(a: Any, b: Any) -> bool:
    import numpy as np

    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        kind = (a.shape, a.dtype) == (b.shape, b.dtype)
        return kind and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and a == b


def judge(case: Case, place: Path, whole: dict[str, Any]) -> tuple[str, str]:
    """The kind of the outcome, and what was said."""
    reader = READERS[case.reader]
    found: list[Any] = []
    said = ""
    for read in reader.read:
        try:
            found.append(read(place / "case"))
        except CLEAR as error:
            said = f"{type(error).__name__}: {error}"
            # Of a file in a checkpoint or model, the folder is name enough.
            whole_folder = case.how in ("gone", "folder") or reader.read[0] is read_model
            inside = case.path.parent if case.path.parent != place / "case" else case.path
            if str(place / "case" if whole_folder else inside) not in said:
                return "unnamed", said
            found.append(None)
        except Exception as error:
            return "unnamed", f"{type(error).__name__}: {error}"
    if any(one is None for one in found) != all(one is None for one in found):
        return "differs", f"one reader refuses: {said}"
    if found[0] is None:
        return "refused", said
    if not all(same(one, found[0]) for one in found):
        return "differs", f"{found}"[:300]
    if same(found[0], whole[case.reader]):
        return "right", ""
    if reader.sums and case.how != "other kind":
        return "silent", f"{found[0]}"[:300]
    return "other", ""


# -------------------------------------------------------------------------------------- the worker


def build(place: Path) -> None:
    """Whole files for all readers, in place/corpus."""
    for name, reader in READERS.items():
        folder = place / "corpus" / name
        folder.mkdir(parents=True)
        reader.make(folder)


def prepare(place: Path) -> dict[str, Any]:
    """What the whole files give, read in place/case as damaged ones are."""
    whole = {}
    for name, reader in READERS.items():
        shutil.rmtree(place / "case", ignore_errors=True)
        shutil.copytree(place / "corpus" / name, place / "case")
        found = [read(place / "case") for read in reader.read]
        if not all(same(one, found[0]) for one in found):
            raise RuntimeError(f"file_fuzz: the readers of a whole {name} disagree")
        whole[name] = found[0]
    return whole


def quiet() -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def work(place: Path) -> None:
    """Reads seeds, one a line, and answers each by a line of JSON."""
    out = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    quiet()
    whole = prepare(place)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    bound = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seed, text = int(line), ""
        try:
            case = make_case(seed, place)
            text = f"{case.reader}: {case.path.name}: {case.how}"
            kind, said = judge(case, place, whole)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if (used - before) * 1024 > RESIDENT and kind not in BAD:
                kind, said, before = "memory", f"{(used - before) >> 10} MiB", used
        except Exception:  # of this file, not of the reading
            kind, said = "machine", traceback.format_exc()
        answer = {"seed": seed, "kind": kind, "case": text, "said": said[:500]}
        print(json.dumps(answer), file=out, flush=True)


def run(seeds: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The outcomes of some seeds."""
    with tempfile.TemporaryDirectory(prefix="hos_file_fuzz_") as name:
        subprocess.run(
            [sys.executable, str(HERE / "file_fuzz.py"), "--build", name],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        program, env = ("file_fuzz.py", "--worker", name), {"HF_HUB_OFFLINE": "1"}
        for answer in answers(
            seeds, lambda: Worker(*program, seconds=SECONDS, wait=SECONDS, env=env)
        ):
            yield {"case": ""} | answer


# ------------------------------------------------------------------------------------- the command


def repeat(seed: int) -> int:
    """One file here, told in full."""
    quiet()
    with tempfile.TemporaryDirectory(prefix="hos_file_fuzz_") as name:
        place = Path(name)
        build(place)
        whole = prepare(place)
        case = make_case(seed, place)
        print(f"{case.reader}: {case.path.name}: {case.how}")
        kind, said = judge(case, place, whole)
        print(f"{kind}: {said}")
        if kind in BAD:
            for read in READERS[case.reader].read:
                try:
                    print(read(place / "case"))
                except Exception:
                    traceback.print_exc()
    return kind in BAD


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--from", dest="first", type=int, help="the first seed; not recorded")
    parser.add_argument("--repeat", type=int, metavar="SEED", help="one file, told in full")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker or asked.build or asked.repeat is not None:
        sys.path.insert(0, str(HERE.parents[1]))
    if asked.worker:
        work(asked.worker)
        return 0
    if asked.build:
        build(asked.build)
        return 0
    if asked.repeat is not None:
        return repeat(asked.repeat)
    first = RECORD.read()["next_seed"] if asked.first is None else asked.first
    counts: Counter[str] = Counter()
    by_reader: dict[str, Counter[str]] = {}
    try:
        for answer in run(range(first, first + asked.files)):
            kind = answer["kind"]
            counts[kind] += 1
            by_reader.setdefault(answer["case"].partition(":")[0], Counter())[kind] += 1
            if kind in BAD:
                print(f"--repeat {answer['seed']}  {kind}  {answer['case']}\n    {answer['said']}")
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass  # what was read counts
    if asked.first is None:
        readers = {name: dict(sorted(by_reader[name].items())) for name in sorted(by_reader)}
        RECORD.keep(first, counts, {"readers": readers})
    RECORD.tell(first, counts)
    return any(counts[kind] for kind in BAD)


if __name__ == "__main__":
    sys.exit(main())
