"""`dall3 weights`: list, download, verify, locate and remove sets of weights."""

from __future__ import annotations

import argparse
from typing import Any

from dall3.formatting import size_text


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("list", "fetch", "verify", "where", "remove"))
    add("name", nargs="?", help="a set of weights; required for fetch and remove (default: all sets)")
    add("--registry", metavar="TOML", help="an additional weights.toml")


def run(args: argparse.Namespace) -> None:
    from dall3.weights.cache import files_of
    from dall3.weights.find import fetch_set, remove_set
    from dall3.weights.registry import find_set, read_registry
    from dall3.weights.verify import verify_file

    known = read_registry(args.registry)
    chosen = list(known.values()) if args.name is None else [find_set(args.name, args.registry)]
    if args.action in ("fetch", "remove") and args.name is None:
        raise ValueError(f"`dall3 weights {args.action}` needs the name of a set: {', '.join(known)}")
    if args.action == "list":
        print(weights_table(chosen))
    elif args.action == "fetch":
        for part, (file, _) in fetch_set(chosen[0]).items():
            print(f"{part}: {file}")
    elif args.action == "remove":
        print(f"removed {size_text(remove_set(chosen[0]))} of {args.name} from the cache")
    else:
        found = [(one, path) for one in sum(map(files_of, chosen), []) if (path := one.find()) is not None]
        if args.name is not None and not found:
            raise ValueError(f"no file of {args.name} is on this machine; run `dall3 weights fetch {args.name}`")
        wrong: dict[str, str] = {}
        for one, path in found:
            problem = verify_file(one, path, thorough=True) if args.action == "verify" else None
            wrong |= {one.name: problem} if problem else {}
            print(f"{one.name}: {path}" if args.action == "where" else f"{one.name}: {problem or 'good'}")
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(found)} files are damaged; remove the set and fetch it again")


def weights_table(sets: list[Any]) -> str:
    """A table with a row per part: set, part, size, licence, on this machine or not, source. Descriptions follow."""
    from dall3.weights.cache import cache_dir, file_size, files_of

    rows = [("set", "part", "size", "licence", "here", "source")]
    for one in sets:
        for part in one.parts:
            files = [wanted for wanted in files_of(one) if wanted.part == part]
            paths = [wanted.find() for wanted in files]
            sizes = [file_size(wanted) for wanted in files]
            here = "yes" if all(paths) else "in part" if any(paths) else "no"
            size = size_text(sum(sizes)) if sizes[0] else "unknown"
            name = one.name if part == one.parts[0] else ""
            rows.append((name, part.name, size, part.licence, here, part.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    abouts = [f"{one.name}: {one.about}{f'. Needs: {one.needs}' if one.needs else ''}" for one in sets if one.about]
    return "\n".join([*lines, "", *abouts, "", f"cache (DALL3_HOME): {cache_dir()}"])
