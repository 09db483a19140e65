"""Hostile training files."""

import os
from collections.abc import Callable
from pathlib import Path

from attacks.attack import Attack

from surogate_formats.foreign_keys import UnknownKeyError
from surogate_formats.training_config import TrainingConfigError, TwoFormatsError

LINES = 9


def text(content: str | bytes, error: type[TrainingConfigError] = TrainingConfigError) -> Attack:
    data = content if isinstance(content, bytes) else content.encode()
    return Attack(lambda directory: (directory / "train.yaml").write_bytes(data), "--config", error, "train.yaml")


def file(make: Callable[[Path], object]) -> Attack:
    return Attack(lambda directory: make(directory / "train.yaml"), "--config", TrainingConfigError, "train.yaml")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**30)


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(LINES))
QUADRATIC = "a: &a " + "x" * 30_000 + "\nb: [" + "*a," * 9000 + "]"

YAML_ATTACKS: dict[str, Attack] = {
    "YAML that calls os.system": text('model: !!python/object/apply:os.system ["true"]'),
    "YAML that makes a Python object": text("model: !!python/object/new:subprocess.Popen [[true]]"),
    "YAML that names a Python function": text("model: !!python/name:os.system"),
    "YAML that imports a module": text("model: !!python/module:os"),
    "YAML of a tuple": text("model: !!python/tuple [1]"),
    "YAML tag for a key": text("? !!python/name:os.system\n: 1"),
    "YAML tag of its own": text("model: !mine {a: 1}"),
    "YAML tag in words": text("model: !<tag:yaml.org,2002:python/name:os.system> x"),
    "YAML tag over a prefix": text("%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !name:os.system x"),
    "YAML timestamp that is none": text("model: !!timestamp x"),
    "YAML boolean that is none": text("lora: !!bool maybe"),
    "YAML integer that is none": text('lora_rank: !!int ""'),
    "YAML of no date": text("model: 2001-99-99"),
    "YAML billion laughs": text(LAUGHS),
    "YAML quadratic blow-up": text(QUADRATIC),
    "YAML that holds itself": text("a: &a [*a]"),
    "YAML alias of nothing": text("a: *b"),
    "YAML merge of an alias": text("a: &a {lora_rank: 8}\nb:\n  <<: *a"),
    "YAML merge": text("<<: {lora_rank: 8}"),
    "YAML merge of a list": text("<<: [{lora_rank: 8}, {lora_rank: 9}]"),
    "YAML of 60 000 brackets": text("a: " + "[" * 60_000),
    "YAML of 60 000 braces": text("a: " + "{" * 60_000),
    "YAML of 300 indented keys": text("".join(" " * i + "a:\n" for i in range(300))),
    "YAML of 30 000 dashes": text("- " * 30_000),
    "YAML of 30 000 question marks": text("? " * 30_000),
    "YAML of 20 000 items": text("a: [" + "1," * 20_000 + "]"),
    "YAML of 5000 keys": text("".join(f"k{i}: {i}\n" for i in range(5000))),
    "YAML key twice": text("lora_rank: 8\nlora_rank: 16"),
    "YAML key twice, once escaped": text('lora_rank: 8\n"lora\\x5frank": 16'),
    "YAML key of others twice, deep": text("a: {b: {c: 1, c: 2}}"),
    "YAML key a list": text("? [a]\n: 1"),
    "YAML key a mapping": text("? {a: 1}\n: 1"),
    "YAML key with a terminal escape": text('"\\e[2J": 1'),
    "YAML key of 60 000 letters": text("? qlora_" + "x" * 60_000 + "\n: 1", UnknownKeyError),
    "YAML of 1 GB": file(sparse),
    "YAML of 70 KB": text("#" + "x" * 70_000),
    "YAML not UTF-8": text(b"model: \xff"),
    "YAML in UTF-16": text("model: a".encode("utf-16")),
    "YAML with a null": text(b"model: a\0b"),
    "YAML with a terminal escape": text(b"model: \x1b[2J"),
    "YAML of a pickle": text(b"\x80\x04cos\nsystem\n"),
    "YAML empty": text(""),
    "YAML a list": text("- lora_rank: 8"),
    "YAML a text": text("lora_rank"),
    "YAML of two documents": text("lora_rank: 8\n---\nlora_rank: 16"),
    "YAML of 10 000 documents": text("---\n" * 10_000),
    "YAML of tabs": text("a:\n\t- b"),
    "YAML cut": text('model: "abc'),
    "YAML rank of 4000 digits": text("lora_rank: " + "9" * 4000),
    "YAML rank of 60 000 digits": text("lora_rank: " + "9" * 60_000),
    "YAML rank in base 60": text("lora_rank: 1:30"),
    "YAML rank in base 8": text("lora_rank: 010"),
    "YAML rank negative": text("lora_rank: -1"),
    "YAML rank 0": text("lora_rank: 0"),
    "YAML rank true": text("lora_rank: true"),
    "YAML rank 16.0": text("lora_rank: 16.0"),
    "YAML rank of 2^31": text("lora_rank: 2147483648"),
    "YAML dropout NaN": text("lora_dropout: .nan"),
    "YAML dropout infinite": text("lora_dropout: .inf"),
    "YAML dropout 1e999": text("lora_dropout: 1.0e+999"),
    "YAML switch in words": text('qlora_fp8: "true"'),
    "YAML model with a terminal escape": text('model: "\\e[2J"'),
    "YAML modules a mapping": text("lora_target_modules: {a: 1}"),
    "YAML modules with a newline": text('lora_target_modules: ["a\\nb"]'),
    "YAML block size a list": text("qlora_bnb_block_size: [64]"),
    "YAML block size of nobody": text("qlora_bnb_block_size: 65"),
    "YAML of two formats": text("qlora_fp8: true\nqlora_fp4: true", TwoFormatsError),
    "YAML misspelled": text("lora_rnak: 8", UnknownKeyError),
    "YAML a directory": file(Path.mkdir),
    "YAML a pipe": file(os.mkfifo),
    "YAML a device": file(lambda path: path.symlink_to("/dev/zero")),
    "YAML a link to itself": file(lambda path: path.symlink_to("train.yaml")),
    "YAML missing": file(lambda path: None),
}
