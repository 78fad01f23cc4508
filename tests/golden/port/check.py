"""Compares what a port computed with the expected values, and names the first deviation.

Run:    python check.py FOLDER    (needs NumPy and safetensors only)
FOLDER: *.safetensors, whose tensors have the manifest's names, or NAME.npy; floats of any width.
        What is missing is passed over.
Exit:   0 all that is there agrees; 1 something deviates; 2 nothing was compared.
"""
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize

HERE = Path(__file__).parent
PLACES = 64  # of an array, evenly spaced, at which mistakes.safetensors has its values
NEAR = 0.7   # how far a mistake's values may be, as a share of the way to the expected ones
SHOWN = 5    # indices that are printed
DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8",
}


def read(path: Path) -> dict:
    """Name -> array, of a safetensors file; bf16, which NumPy lacks, as float32."""
    arrays = {}
    for name, x in deserialize(path.read_bytes()):
        value = np.frombuffer(x["data"], DTYPES[x["dtype"]])
        if x["dtype"] == "BF16":
            value = (value.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = value.reshape(x["shape"])
    return arrays


def read_manifest() -> dict:
    """"vectors", a list of rows in the order of a port, and "mistakes", name -> sentence."""
    return json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))


def read_folder(folder: Path) -> dict:
    """Name -> array, of all files in a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read(path)
    for path in sorted(folder.glob("*.npy")):
        found[path.stem] = np.load(path)
        if found[path.stem].dtype.kind not in "biuf":
            raise ValueError(f"{path.name} holds {found[path.stem].dtype}, not numbers")
    return found


def excess(found: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """By how many tolerances each value deviates; of an exact one, 2 where it does."""
    found, expected = np.float64(found), np.float64(expected)
    both = np.isnan(found) & np.isnan(expected)
    difference = np.where(both | (found == expected), 0, np.abs(found - expected))
    difference = np.nan_to_num(difference, nan=np.inf)
    return difference / tolerance if tolerance else 2.0 * (difference > 0)


def fitted(found: dict, expected: dict) -> dict:
    """`found`, where axes of size 1 do not count: (), (1,) and (1, 1) are one shape."""
    out = dict(found)
    for name in set(found) & set(expected):
        x, shape = found[name], expected[name].shape
        if np.squeeze(x).shape == tuple(n for n in shape if n != 1):
            out[name] = x.reshape(shape)
    return out


def used(found: dict, rows: list, expected: dict) -> dict:
    """Name -> the largest share of its tolerance that a found vector uses; inf if misshapen."""
    shares = {}
    for row in rows:
        name = row["name"]
        if name in found:
            fits = list(found[name].shape) == row["shape"]
            shares[name] = np.inf
            if fits:
                values = excess(found[name], expected[name], row["tolerance"])
                shares[name] = float(values.max())
    return shares


def first_deviation(shares: dict, rows: list) -> tuple:
    """The first row that deviates while nothing it needs does; and names of the other such."""
    tainted, roots = set(), []
    for row in rows:
        deviates = shares.get(row["name"], 0) > 1
        follows = tainted & set(row["needs"])
        if deviates and not follows:
            roots.append(row)
        if deviates or follows:
            tainted.add(row["name"])
    return roots[0], [row["name"] for row in roots[1:]]


def lookalikes(found: np.ndarray, expected: np.ndarray, row: dict) -> list:
    """(how near, mistake) of those whose values these nearly are, the nearest first.

    How near: the distance to the mistake's values, as a share of that to the expected ones; what
    is whole has to be equal.
    """
    flat, at = np.float64(found).ravel(), places(found.size)
    here = flat[at]
    far = 1.0
    if found.shape == expected.shape:
        far = np.linalg.norm(np.nan_to_num(here - np.float64(expected).ravel()[at], posinf=1e12))
    near = []
    for key, values in read(HERE / "mistakes.safetensors").items():
        mistake, _, name = key.partition("|")
        if name == row["name"] and values.shape == here.shape:
            same = np.isclose(here, values, 1e-12, row["tolerance"], equal_nan=True)
            off = np.where(same, 0, np.nan_to_num(np.abs(here - values), nan=1e12))
            share = np.linalg.norm(off) / max(far, 1e-30)
            if share <= NEAR and (row["tolerance"] or same.all()):
                near.append((share, mistake))
    near.sort()
    return [(share, name) for share, name in near if share <= 2 * near[0][0] + 0.01]


def places(size: int) -> np.ndarray:
    """Evenly spaced indices of a flat array, PLACES at most."""
    return np.unique(np.linspace(0, size - 1, PLACES).astype(int))


def simple(found: np.ndarray, expected: np.ndarray, row: dict) -> list:
    """What can be seen without knowing the vector: sign, a factor, one place late, no finite."""
    a, b = np.float64(found), np.float64(expected)
    said = []
    if not np.isfinite(a).all():
        said.append(f"{(~np.isfinite(a)).sum()} values are not finite")
        return said
    kinds = {"the sign is turned": -b}
    if expected.dtype == bool:
        kinds = {"yes and no are exchanged": 1 - b}
    for axis in range(b.ndim):
        kinds[f"everything is one place late on axis {axis}"] = np.roll(b, 1, axis)
        kinds[f"everything is one place early on axis {axis}"] = np.roll(b, -1, axis)
    factor = (a * b).sum() / max((b * b).sum(), 1e-30)
    kinds[f"all is {factor:.6g} times what it should be"] = factor * b
    for what, value in kinds.items():
        if factor and (excess(a, value, row["tolerance"]) <= 1).all():
            said.append(what)
    return said


def told(found: np.ndarray, expected: np.ndarray, row: dict, manifest: dict) -> list:
    """Lines on one vector that deviates: where, how large, and what it looks like."""
    lines = [f"FIRST DEVIATION: {row['name']}  ({row['where']})", f"  {row['what']}"]
    if row["needs"]:
        lines.append(f"  it needs {', '.join(row['needs'])}: these agree, or are missing")
    if found.shape != expected.shape:
        turned = ", its axes exchanged" * (sorted(found.shape) == sorted(expected.shape))
        lines.append(f"  shape {found.shape}, expected {expected.shape}{turned}")
        guesses = []
    else:
        lines += where(found, expected, row)
        guesses = simple(found, expected, row)
    likes = lookalikes(found, expected, row)
    if not likes or likes[0][0] >= 0.1:
        lines += [f"  LOOKS LIKE: {what}" for what in guesses]
    for share, name in likes:
        like = "LOOKS LIKE" if share < 0.1 else f"PERHAPS ({share:.0%} is something else)"
        lines.append(f"  {like}: {manifest['mistakes'][name]} [{name}]")
    if not likes + guesses:
        lines.append(f"  like none of the {len(manifest['mistakes'])} mistakes that are known here")
    return lines


def where(found: np.ndarray, expected: np.ndarray, row: dict) -> list:
    """Lines: how many values deviate, the worst, and the first."""
    values = excess(found, expected, row["tolerance"])
    bad = np.argwhere(values > 1)
    worst = np.unravel_index(values.argmax(), values.shape)
    indices = ", ".join(str(tuple(index.tolist())) for index in bad[:SHOWN])
    return [
        f"  {len(bad)} of {values.size} values deviate; tolerance {row['tolerance']:.2g} "
        f"({row['why']})",
        f"  the worst, at {tuple(map(int, worst))}: {found[worst]!s}, expected {expected[worst]!s}",
        f"  at {indices}{' ...' * (len(bad) > SHOWN)}",
    ]


def main(folder: Path) -> int:
    """Prints what was compared and the first deviation; returns the exit status."""
    manifest = read_manifest()
    rows, expected = manifest["vectors"], read(HERE / "expected.safetensors")
    try:
        found = fitted(read_folder(folder), expected)
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        print(f"{folder} cannot be read: {e}")
        return 2
    shares = used(found, rows, expected)
    strange = sorted(set(found) - set(expected))
    if strange:
        print(f"not in the manifest: {', '.join(strange[:SHOWN])}{' ...' * (len(strange) > SHOWN)}")
    if not shares:
        print(f"nothing to compare in {folder}: no tensor has a name of manifest.json")
        return 2
    wrong = [name for name, share in shares.items() if share > 1]
    right = [share for name, share in shares.items() if share <= 1]
    print(f"{len(right)} of {len(shares)} vectors agree, {len(rows) - len(shares)} are missing; at "
          f"most {max(right, default=0):.0%} of a tolerance is used")
    if not wrong:
        return 0
    row, others = first_deviation(shares, rows)
    print("\n".join(told(found[row["name"]], expected[row["name"]], row, manifest)))
    follow = len(wrong) - 1 - len(others)
    print(f"{follow} more deviate that need it or another; deviating by themselves: "
          f"{', '.join(others) or 'none'}")
    return 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
