"""Show runs and caches in the browser: figures, rollouts, tokens.

    dualkl view runs/demo                     one run, as the file view.html
    dualkl view runs/a runs/b                 runs over each other
    dualkl view runs/demo/cache --serve       a whole cache, read on demand

A RUN is a run's folder, a CACHE a cache's folder or URL. The file stands alone:
it opens without a network.

    --out FILE       the file to write (view.html)
    --rows N         rollouts of each run; otherwise 200 in all, or as many as
                     fit into 3 MB
    --serve [PORT]   answer at this machine's loopback address instead, with
                     every row
    --open           open the page in the browser
    --quiet, --json  what is printed

Loads no model, runs no answer checker, changes nothing in a run or a cache.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "view")

import argparse
import sys
import webbrowser
from pathlib import Path

import cache
from stages import report
from stages.runtime import ending, options
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text
from stages.runtime.run_folders import find_run, runs_near
from stages.runtime.terminal import Style, take_style
from stages.viewer import page, serve
from stages.viewer.gather import Source, page_data


def main() -> None:
    style, arguments = take_style(sys.argv[1:])
    given = options.of_view(arguments)
    sources = [source(place) for place in given.places]
    if given.serve is not None:
        return _serve(style, sources, given)
    out = Path(given.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}; make it, or give another.")
    data = page_data(sources, given.rows)
    text = page.render(data)
    replace_text(out, text)
    lines = [f"{run['name']}: {run['rollouts']['how'] or 'no rollouts.'}" for run in data["runs"]]
    lines += [f"note: {note}" for run in data["runs"] for note in run["notes"]]
    size = len(text.encode())
    facts = {"page": str(out), "bytes": size, "notes": [run["notes"] for run in data["runs"]]}
    style.conclude("\n".join([*lines, f"look    {out} ({size / 1e6:.1f} MB)"]), facts)
    if given.open:
        webbrowser.open(out.resolve().as_uri())
    return None


def source(place: str) -> Source:
    """The run or the cache at `place`, read; UserError if it is neither."""
    if (folder := find_run(place)) is not None:
        return report.source(folder)
    if cache.exists(place):
        parts = [part for part in place.split("/") if part]
        return Source("/".join(parts[-2 if parts[-1:] == ["cache"] else -1 :]) or place, place)
    raise UserError(
        f"{place} is neither a run (it has no config.yaml or metrics.jsonl) nor a cache (no"
        f" fingerprint.json); {runs_near(place)}."
    )


def _serve(style: Style, sources: list[Source], given: argparse.Namespace) -> None:
    """Serve until interrupted."""
    rows = [serve.Rows(one, style.say) for one in sources]
    for own in rows:
        if own.snapshot is not None:
            style.say(f"reading {len(own.snapshot):,} rows of {own.snapshot.root}")
        _ = own.table
    html = page.render(page_data(sources, given.rows, serve=True))
    with serve.Server(html, rows, given.serve) as server:
        ending.uninstall()  # nothing is lost when a server ends
        try:
            style.conclude(f"look    {server.address}\n        Ctrl-C ends it", {"address": server.address})
            if given.open:
                webbrowser.open(server.address)
            server.serve_forever()
        except KeyboardInterrupt:
            style.say("\nstopped; an open page can no longer read rows")


if __name__ == "__main__":
    command(main)
