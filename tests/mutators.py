"""Damage files in ways that keep their structure: headers with right checksums, JSON trees, archives, names, pickles.

Each mutator takes the bytes of a whole file and a `random.Random`, and returns other bytes.
"""

import copy
import io
import json
import os
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

TOKENS = (
    *(b"../", b"/etc/passwd", b"..\\", b"C:\\x", b"\0", b"\xff\xfe", b"-1", b"0", b"1e999", b"NaN", b"null", b"{}"),
    *(b"[", b"]", b'"', b",", b"\n", b"true", b"9" * 400, b"9" * 5000, b"[" * 3000, b"255", b"\xef\xbb\xbf", b"1e-9"),
    *(b"\xed\xa0\x80", "\u00b2".encode(), "e\u0301".encode(), b"...", b"\r", b"\x1b[2J", b"$x^{$", b"<img src=x>"),
    *(struct.pack("<I", n) for n in (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)),
    *(struct.pack(">I", n) for n in (2**16, 2**31 - 1)),
    *(struct.pack("<Q", n) for n in (2**40, 2**62, 2**64 - 1)),
)
VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e-308, 0.5, float("inf"), float("nan")),
    *("", " ", "a", "..", "../x", "/x", "\0", "\ud800", "x" * 5000, "\u00b2", "background", "$x^{$", "cpu", "a\nb"),
    *([], {}, [[]], [1], ["a"], [None], {"a": 1}, {"": []}, [[1, 2, 3, 4, 5, 6]], {"size": [1, 1], "counts": "1"}),
)
NUMBERS = (0, 1, 2, 255, 256, 4096, 65_500, 65_535, 11_585, 2**16, 2**24, 2**27, 2**31 - 1, 2**32 - 1)
OPCODES = (
    *(b"cbuiltins\nbytearray\n", b"\x8a\x05" + (4 << 30).to_bytes(5, "little"), b"\x85R", b"R", b"b", b"Q", b"}", b")"),
    *(b"ctorch\nUntypedStorage\n", b"ctorch\nFloatStorage\n", b"cposix\nsystem\n", b"ccollections\nCounter\n", b"t"),
    *(b"(", b"2", b"0", b"r\xff\xff\xff\x7f", b"\x8e" + struct.pack("<Q", 2**40), b"\x96" + struct.pack("<Q", 2**40)),
    *(b"ctorch._utils\n_rebuild_qtensor\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"s", b"u", b"a", b"\x93"),
)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, bytes, parts cut, repeated or moved, numbers and words put in."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(content) + 1)
        other = min(len(content), at + chance.choice((1, 2, 8, 64, 1024)))
        kind = chance.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << chance.randrange(8)
        elif kind == 1 and content:
            content[at % len(content)] = chance.randrange(256)
        elif kind == 2:
            del content[at:other]
        elif kind == 3:
            content[at:at] = content[at:other] * chance.choice((1, 2, 50))
        elif kind == 4:
            del content[at:]
        elif kind == 5:
            content[at:at] = chance.choice(TOKENS)
        else:
            token = chance.choice(TOKENS)
            content[at : at + len(token)] = token
    return bytes(content)


def json_tree(data: bytes, chance: random.Random) -> bytes:
    """Values, keys and branches of a JSON file (or of its lines) replaced, dropped, repeated or moved elsewhere."""
    lines = data.decode().splitlines() if data.count(b"\n{") else [data.decode()]
    at = chance.randrange(len(lines))
    tree = [json.loads(lines[at])]
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        node, key = chance.choice(places)
        other, there = chance.choice(places)
        kind = chance.randrange(6)
        if kind <= 2 or key not in _keys(node):
            node[key] = copy.deepcopy(chance.choice(VALUES))  # a later change must not reach the table
        elif kind == 3 and len(places) > 1 and node is not tree:
            del node[key]
        elif kind == 4 and there in _keys(other):
            node[key] = json.loads(json.dumps(other[there]))
        elif isinstance(node, dict):
            node[str(chance.choice(VALUES))[:20]] = node.pop(key)
        else:
            node.extend([node[key]] * chance.choice((1, 50)))
    lines[at] = json.dumps(tree[0] if tree else None)
    return ("\n".join(lines) + "\n").encode()


def _keys(node):
    return node if isinstance(node, dict) else range(len(node))


def _places(node):
    for key in list(_keys(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])


def png_chunks(data: bytes, chance: random.Random) -> bytes:
    """Chunks of a PNG changed, moved, repeated or packed anew; their checksums are right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], bytearray(data[at + 8 : at + 8 + size])])
        at += size + 12
    for _ in range(chance.choice((1, 1, 2))):
        chunk = chance.choice(chunks)
        kind = chance.randrange(6)
        if kind == 0:  # a number of the header
            place, width = chance.choice(((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)))
            number = chance.choice(NUMBERS) if width == 4 else chance.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
            chunks[0][1][place : place + width] = number.to_bytes(width, "big")
        elif kind == 1 and chunk[1]:
            chunk[1][:] = damaged(bytes(chunk[1]), chance)
        elif kind == 2:
            chunks.insert(chance.randrange(len(chunks) + 1), [chunk[0], bytearray(chunk[1])])
        elif kind == 3:
            chunk[0] = chance.choice((b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"eXIf", b"IEND", b"gAMA"))
        elif kind == 4:
            bomb = zlib.compress(bytes(chance.choice((0, 10**4, 10**7))))
            chunks.insert(1, [chance.choice((b"zTXt", b"iCCP", b"IDAT")), bytearray(b"k\0\0" + bomb)])
        else:
            chance.shuffle(chunks)
    packed = (k + bytes(c) for k, c in chunks)
    return data[:8] + b"".join((len(p) - 4).to_bytes(4, "big") + p + zlib.crc32(p).to_bytes(4, "big") for p in packed)


def jpeg_segments(data: bytes, chance: random.Random) -> bytes:
    """Segments of a JPEG changed, repeated or dropped, sizes declared, scans repeated."""
    starts = [m.start() for m in re.finditer(rb"\xff[^\x00\xd0-\xd7\xff]", data)]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(parts))
        kind = chance.randrange(5)
        frames = [i for i, part in enumerate(parts) if len(part) > 9 and part[1] in (0xC0, 0xC1, 0xC2)]
        if kind == 0 and frames:
            part = bytearray(parts[frames[0]])
            place, width = chance.choice(((4, 1), (5, 2), (7, 2), (9, 1)))
            part[place : place + width] = (chance.choice(NUMBERS) % 256**width).to_bytes(width, "big")
            parts[frames[0]] = bytes(part)
        elif kind == 1:
            parts[at] = damaged(parts[at], chance)
        elif kind == 2:
            parts.insert(at, parts[at] * chance.choice((1, 20, 200)))
        elif kind == 3:
            parts[at] = parts[at][:2] + struct.pack(">H", chance.choice((0, 1, 2, 65535))) + parts[at][4:]
        elif len(parts) > 1:
            del parts[at]
    return b"".join(parts)


def numbers(data: bytes, chance: random.Random) -> bytes:
    """A number of the header (BMP, MATLAB, NumPy, safetensors) replaced by one that is too large, or by 0."""
    content = bytearray(data)
    width = chance.choice((1, 2, 4, 8))
    at = chance.randrange(max(1, min(len(content), 300) - width))
    number = chance.choice((*NUMBERS, 2**40, 2**63)) % 256**width
    content[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
    return bytes(content)


def archive(data: bytes, chance: random.Random) -> bytes:
    """Parts of an archive damaged, renamed, dropped, repeated or packed; opcodes and numbers put into its pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        parts = [[name, old.read(name)] for name in old.namelist()]
    for _ in range(chance.choice((1, 1, 2))):
        part = chance.choice(parts)
        kind = chance.randrange(6)
        if kind == 0:
            part[1] = damaged(part[1], chance)
        elif kind == 1:
            part[0] = part[0].partition("/")[0] + chance.choice(("/data.pkl", "/DATA.pkl", "/data/0", "/../x", "", "/"))
        elif kind == 2:
            parts.append([part[0], part[1] * chance.choice((1, 3))])
        elif kind == 3 and len(parts) > 1:
            parts.remove(part)
        elif kind == 4:
            part[1] = numbers(part[1], chance) if part[1] else b"x"
        else:
            described = next((p for p in parts if p[0].endswith(("data.pkl", "labelmap.txt"))), part)
            at = chance.randrange(len(described[1]) + 1)
            described[1] = described[1][:at] + chance.choice(OPCODES) + described[1][at:]
    file = io.BytesIO()
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", chance.choice((0, 0, 0, 8))) as new:
        warnings.simplefilter("ignore")  # a name that comes twice
        for name, content in parts:
            new.writestr(name or "x", content)
    return file.getvalue()


def opcodes(data: bytes, chance: random.Random) -> bytes:
    """Opcodes put into the pickle of a NumPy file or of an old file of torch."""
    at = chance.randrange(min(len(data), 128), len(data) + 1) if len(data) > 128 else chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(OPCODES) + data[at:]


def words(data: bytes, chance: random.Random) -> bytes:
    """Words and lines of a list, a table or an XML file replaced, repeated, dropped or moved."""
    parts = re.split(rb"([\s,;<>=/\"]+)", data)
    for _ in range(chance.choice((1, 1, 3))):
        at = chance.randrange(len(parts))
        kind = chance.randrange(4)
        if kind == 0:
            parts[at] = chance.choice(TOKENS)
        elif kind == 1:
            parts[at:at] = parts[at : at + chance.choice((1, 3, 9))] * chance.choice((1, 40))
        elif kind == 2:
            del parts[at : at + chance.choice((1, 2, 4))]
            parts = parts or [b""]
        else:
            parts[at] = chance.choice(
                (b"klingon", b"/", b"//", b"SegmentationClass\0x/", b"\xe9", b"utf-16", b"&e;", b"]]>")
            )
    return b"".join(parts)


def fields(data: bytes, chance: random.Random) -> bytes:
    """Values of lines NAME=VALUE replaced by others of their kind, or of any."""
    lines = data.decode().split("\n")
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(lines))
        name, _, value = lines[at].partition("=")
        other = chance.choice(lines).partition("=")[2]
        number = chance.choice((*NUMBERS, 0.5, 1e-9, 1e300, -1, 10**30, 3, 7))
        lines[at] = f"{name}={chance.choice((number, other, repr(chance.choice(VALUES)), f'({value}, {number})'))}"
    return "\n".join(lines).encode("utf-8", "surrogateescape")


LINKS = (
    "/",
    "..",
    "../..",
    ".",
    "/usr",
    "/etc/passwd",
    "/dev/zero",
    "/nowhere",
    "images",
    "JPEGImages",
    "../secret.jpg",
)
PARTS = (
    *(
        "",
        ".",
        "..",
        " ",
        "a" * 255,
        "a" * 300,
        "x/" * 400 + "y.jpg",
        "\0",
        "a\nb",
        "\x1b[2J",
        "$x^{$",
        "<img src=x>",
        "-rf",
    ),
    *(
        "caf\udce9",
        "\u202eabc",
        "e\u0301",
        "\u00e9",
        "CAT",
        "masks",
        "train",
        "val",
        "..jpg",
        ".jpg",
        "a.jpg.png",
        "C:",
        "\\",
    ),
    *("JPEGImages", "ImageSets", "annotations", "instances_x.json", "tags.csv", "classes.txt", "Annotations", "__x"),
)
KINDS = ("photo", "mask", "tiny", "empty", "noise", "text", "folder", "pipe", "hole", "link", "locked")


def tree(data: bytes, chance: random.Random) -> bytes:
    """Entries of a folder (see `fuzz_readers.built`) renamed, moved, repeated, dropped, or turned into others."""
    layouts = json.loads(data)
    entries = layouts[chance.choice(sorted(layouts))]
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        at = chance.randrange(len(entries))
        name, kind, content = entries[at]
        parts = name.split("/")
        place = chance.randrange(len(parts))
        change = chance.randrange(7)
        if change == 0:
            parts[place] = chance.choice(PARTS)
        elif change == 1:
            parts.insert(place, chance.choice(PARTS))
        elif change == 2 and len(parts) > 1:
            parts = parts[: place + 1]
        elif change == 3:
            kind, content = chance.choice(KINDS), chance.choice(LINKS)
        elif change == 4 and len(entries) > 1:
            entries.pop(at)
            continue
        elif change == 5 and kind == "text":
            content = words(content.encode(), chance).decode("utf-8", "surrogateescape")
        else:
            other = chance.choice(entries)
            entries.append(["/".join(parts), *other[1:]])
            continue
        entries[at] = ["/".join(parts), kind, content]
    return json.dumps(entries).encode()


MUTATORS: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    ".jpg": (damaged, jpeg_segments, jpeg_segments),
    ".png": (damaged, png_chunks, png_chunks),
    ".bmp": (damaged, numbers, numbers),
    ".mat": (damaged, numbers, numbers),
    ".npy": (damaged, numbers, opcodes),
    ".json": (damaged, json_tree, json_tree, json_tree),
    ".jsonl": (damaged, json_tree, json_tree),
    ".txt": (damaged, words, words),
    ".words": (words, damaged, fields, fields),
    ".tree": (tree,),
    ".csv": (damaged, words, words),
    ".xml": (damaged, words, words),
    ".pt": (damaged, archive, archive),
    ".pth": (damaged, archive, archive),
    ".npz": (damaged, archive, archive),
    ".zip": (damaged, archive, archive),
    ".old": (damaged, opcodes, numbers),
    ".safetensors": (damaged, numbers, words),
}


def mutated(data: bytes, suffix: str, chance: random.Random) -> bytes:
    """One mutation that suits the kind of file."""
    return chance.choice(MUTATORS[suffix])(data, chance)


def special(path: Path, chance: random.Random) -> None:
    """Put something in the place of a file that is none: a pipe, a device, a folder, an endless hole, links."""
    path.unlink(missing_ok=True)
    kind = chance.randrange(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(chance.choice(("/dev/zero", "/dev/null", "/dev/urandom", "/proc/self/mem", "/proc/self/maps")))
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.write_bytes(b"[")
        os.truncate(path, chance.choice((1 << 20, 1 << 32, 100 << 30)))
    elif kind == 4:
        path.symlink_to(path)
    elif kind == 5:
        path.symlink_to("/nowhere/at/all")
    else:
        path.write_bytes(b"")


def restored(path: Path, content: bytes) -> None:
    """The file again, whatever is in its place."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif os.path.lexists(path):
        path.unlink()
    path.write_bytes(content)
