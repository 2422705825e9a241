"""At the top of every notebook page: a badge that opens it in Colab. The .ipynb is made when the site is built.

The badge is a link with a style of its own (`anywidth.css`), so that pages load nothing from elsewhere.
"""

from pathlib import Path

import jupytext

SOURCE = "https://colab.research.google.com/github/anywidth/anywidth/blob/gh-pages/notebooks/{name}.ipynb"


def add_badge(app, docname, source):
    if docname.startswith("notebooks/") and docname != "notebooks/index":
        url = SOURCE.format(name=docname.split("/")[1])
        head, _, rest = source[0].partition("\n# ")
        title, _, body = rest.partition("\n")
        source[0] = f"{head}\n# {title}\n\n{{.colab}}\n[Open in Colab]({url})\n{body}"


def write_notebooks(app, exception):
    """The notebooks as .ipynb files beside their pages, for Colab."""
    if exception is not None or app.builder.name != "html":
        return
    for path in sorted(Path(app.srcdir, "notebooks").glob("*.md")):
        if path.stem != "index":
            jupytext.write(jupytext.read(path), Path(app.outdir, "notebooks", f"{path.stem}.ipynb"))


def setup(app):
    app.connect("source-read", add_badge)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True}
