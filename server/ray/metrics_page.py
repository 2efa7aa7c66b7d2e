"""Metrics of all replicas on one page, each sample labelled with its replica."""

from collections.abc import Mapping


def merged(pages: Mapping[str, str]) -> str:
    """Return one page in Prometheus' text format of the pages by replica.

    All samples of a family stand together, as the format wants it; its help and type are those of the first page.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for replica, page in pages.items():
        family, known = "", False
        for line in page.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                known = family in families
                families.setdefault(family, ([], []))
            about, samples = families.setdefault(family, ([], []))
            if not line.startswith("#"):
                samples.append(_labelled(line, replica))
            elif not known:
                about.append(line)
    return "".join(f"{line}\n" for about, samples in families.values() for line in (*about, *samples))


def _labelled(sample: str, replica: str) -> str:
    """``requests{route="/"} 3`` -> ``requests{replica="r",route="/"} 3``. A name has no space and no brace."""
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
