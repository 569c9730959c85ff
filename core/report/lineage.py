"""What the student was made from and what was kept: export, teachers, data, code, attempts, checkpoints, recipe."""

from __future__ import annotations

from collections.abc import Iterable

from core.models.locate import weights_uri
from core.report.facts import Attempt, Facts, Json
from core.report.page import NONE, Html, code, duration, join, moment, size, table, tag, warning
from core.storage import resolve

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "numpy", "safetensors", "ray", "submitit")
DATA = (("data", "source"), ("data", "heldout"), ("evaluate", "train"), ("evaluate", "test"))


def export(f: Facts) -> Html:
    head = tag("h2", "Export")
    if not f.exported:
        what = " writes the student for plain timm."
        return tag("section", head, tag("p", "Not exported yet: ", code(f.command("export")), what))
    files = [(code(entry.key.rpartition("/")[2]), size(entry.size)) for entry in f.exported]
    made = max(entry.modified for entry in f.exported)
    where = tag("p", "In ", code(f"{f.uri}/export/"), f", written {moment(made)}:")
    parts = [where, table([("File", "name"), ("Size", "num")], files, slim=True)]
    if f.arguments:
        parts += [tag("p", "To load it with nothing but timm and safetensors:"), tag("pre", snippet(f.arguments))]
    licences = {str(t.get("licence", "unknown")) for t in (f.recipe.get("teachers") or {}).values()}
    if licences:
        named = ", ".join(sorted(licences))
        parts.append(tag("p", f"Licences of the teachers, which may bind what is derived from them: {named}."))
    if late := f.outdated(made):
        parts.append(warning(f"Exported {late}; again: ", code(f.command("export"))))
    return tag("section", head, *parts)


def snippet(arguments: Json) -> str:
    """Three lines that load the exported student."""
    options = "".join(f", {name}={given!r}" for name, given in arguments.items() if name != "model_name")
    return (
        "import timm, safetensors.torch\n"
        f"model = timm.create_model({arguments.get('model_name', '')!r}{options})\n"
        'model.load_state_dict(safetensors.torch.load_file("model.safetensors"), strict=True)'
    )


def origins(f: Facts) -> Html:
    head = tag("h2", "Lineage")
    if not f.record and not f.recipe:
        return tag("section", head, tag("p", "The run's record is not there: its creation was cut short."))
    facts = _facts([*_data(f), *_code(f.record)])
    return tag("section", head, tag("h3", "Teachers"), _teachers(f), tag("h3", "Data and code"), facts)


def _teachers(f: Facts) -> Html:
    teachers: dict[str, Json] = f.recipe.get("teachers") or {}
    if not teachers:
        return tag("p", "None.")
    columns = [("Teacher", "name"), ("timm model", "name"), ("Weights and their SHA-256", "mono"), ("Licence", "name")]
    recorded: dict[str, Json] = f.record.get("teachers") or {}
    rows = []
    for key, teacher in sorted(teachers.items()):
        known = {**teacher, **recorded.get(key, {})}
        weights, name = str(known.get("weights", "")), str(known.get("name", ""))
        where = "random: none loaded" if weights == "random" else weights_uri(weights, name, f.root)
        sha = known.get("sha256") or ("" if weights == "random" else "checksum unknown")
        rows.append([key, name, join([where, sha] if sha else [where], tag("br")), known.get("licence", "unknown")])
    return table(columns, rows)


def _data(f: Facts) -> list[tuple[str, object]]:
    found = [(f"{group}.{name}", (f.recipe.get(group) or {}).get(name)) for group, name in DATA]
    return [(field, code(resolve(str(uri), f.root))) for field, uri in found if uri]


def _code(record: Json) -> list[tuple[str, object]]:
    packages: dict[str, str] = record.get("packages") or {}
    listed = ", ".join(f"{name} {version}" for name, version in packages.items())
    main = ", ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages)
    every = tag("details", tag("summary", f"all packages ({len(packages)})"), tag("p", listed, cls="soft"))
    dirty = tag("span", " with uncommitted changes", cls="bad") if record.get("dirty") else ""
    return [
        ("Commit", join([code(record.get("commit", "unknown")), dirty])),
        ("Fingerprint", code(record.get("fingerprint", "unknown"))),
        ("Created", moment(record["created"]) if "created" in record else "unknown"),
        ("Profile", record.get("profile") or "none"),
        ("Overrides", join((code(item) for item in record.get("dotlist") or []), ", ") or "none"),
        ("Packages", join([main, every]) if packages else "unknown"),
    ]


def _facts(pairs: Iterable[tuple[str, object]]) -> Html:
    return tag("dl", *(join([tag("dt", name), tag("dd", said)]) for name, said in pairs), cls="facts")


def attempt_table(f: Facts) -> Html:
    columns = [("Attempt", "num"), ("From step", "num"), ("At work", "num"), ("Started", "name"), ("Ended", "name")]
    tries = f.attempts()
    if not tries:
        return tag("section", tag("h2", "Attempts"), tag("p", "None yet. To start one: ", code(f.command("resume"))))
    columns += [("Where", "name"), *[("Why", "words")] * any(map(_reason, tries))]
    rows = [_attempt(f, attempt)[: len(columns)] for attempt in tries]
    said = [
        tag("details", tag("summary", f"what attempt {attempt.number} said"), tag("pre", _reason(attempt)))
        for attempt in tries
        if "\n" in _reason(attempt)
    ]
    return tag("section", tag("h2", "Attempts"), table(columns, rows), *said)


def _attempt(f: Facts, a: Attempt) -> list[object]:
    ranks = f"{a.info['ranks']} x {a.info.get('device', '')}" if "ranks" in a.info else ""
    where = ", ".join(str(part) for part in (ranks, a.info.get("host"), a.info.get("launcher")) if part)
    return [
        a.number,
        f"{f.starts[a.number]:,}" if a.number in f.starts else NONE,
        duration(a.seconds(f.now)) if a.started else NONE,
        moment(a.started) if a.started else NONE,
        a.state,
        where,
        _reason(a).partition("\n")[0],
    ]


def _reason(a: Attempt) -> str:
    return str(a.info.get("reason", "")).strip()


def checkpoint_table(f: Facts) -> Html:
    head = tag("h2", "Checkpoints")
    if not f.checkpoints:
        every = (f.recipe.get("checkpoint") or {}).get("every_steps")
        when = f" The recipe writes one every {every:,} steps (checkpoint.every_steps)." if every else ""
        return tag("section", head, tag("p", f"None yet.{when}"))
    columns = [("Step", "num"), ("Size", "num"), ("Attempt", "num"), ("Written", "name")]
    rows = [(f"{c.step:,}", size(c.size), c.attempt, moment(c.written)) for c in f.checkpoints]
    return tag("section", head, table(columns, rows, slim=True))


def recipe(f: Facts) -> Html:
    if not f.recipe_yaml:
        return Html("")
    told = tag("summary", "the resolved recipe: every field with the value that was used")
    return tag("section", tag("h2", "Recipe"), tag("details", told, tag("pre", f.recipe_yaml)))


def footer(f: Facts) -> Html:
    again = code(f.command("report"))
    return tag("footer", f"Written {moment(f.now)} by Retort from ", code(f"{f.uri}/"), ". Again: ", again)
