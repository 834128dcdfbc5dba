"""Write reference/commands.md in both languages: the commands and their options, from the source.

python docs/commands.py
"""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any, Literal

import typer.models

from ddparity.cli import app
from ddparity.launcher.options import help_text

DOCS = Path(__file__).parent

_ENGLISH = """\
# Commands

`docs/commands.py` writes this page from the source. `ddparity COMMAND --help` shows the same in the terminal.

TASK is `file.py:name` or `package.module:name`. You may leave the name out if there is only one Task.

## ddparity run

```text
{run}
```
"""

# What the source says stays in English.
_CHINESE = """\
# <a id="commands"></a>命令

本页由 `docs/commands.py` 从源码生成，选项的说明保留英文。在终端里用 `ddparity COMMAND --help` 可以看到同样的内容。

TASK 写成 `file.py:name` 或 `package.module:name`。只有一个 Task 时，可以省略名字。

## <a id="ddparity-run"></a>ddparity run

```text
{run}
```
"""


def pages() -> dict[Path, str]:
    """Return the text of the page in each language."""
    commands = [one.callback for one in app.registered_commands if one.callback.__name__ != "run"]
    sections = [_section(command) for command in commands]
    chinese = [
        re.sub(r"^## ((\S+) (\S+))$", r'## <a id="\2-\3"></a>\1', section, count=1, flags=re.M).replace(
            "| argument | meaning |", "| 参数 | 含义 |"
        )
        for section in sections
    ]
    run = help_text().strip()
    return {
        DOCS / "reference" / "commands.md": "\n".join([_ENGLISH.format(run=run), *sections]),
        DOCS / "zh" / "reference" / "commands.md": "\n".join([_CHINESE.format(run=run), *chinese]),
    }


def _section(command: Any) -> str:
    kinds = typing.get_type_hints(command, include_extras=True)
    rows = [_row(name, kinds[name], one.default) for name, one in inspect.signature(command).parameters.items()]
    table = "| argument | meaning |\n| --- | --- |\n" + "\n".join(rows)
    return f"## ddparity {command.__name__}\n\n{' '.join(command.__doc__.split())}\n\n{table}\n"


def _row(name: str, kind: Any, default: Any) -> str:
    """Return the line of one argument, whose annotation has what typer shows of it."""
    plain, *others = typing.get_args(kind)
    (about,) = [one for one in others if isinstance(one, typer.models.ParameterInfo)]
    choices = typing.get_args(plain) if typing.get_origin(plain) is Literal else ()
    value = about.metavar or " or ".join(choices)
    # typer keeps the first name in `default`, where an argument without Annotated has its value.
    given = [one for one in (about.default, *(about.param_decls or ())) if isinstance(one, str)]
    names = ", ".join(given or [f"--{name.replace('_', '-')}"])
    is_option = isinstance(about, typer.models.OptionInfo)
    shown = f"{names} {value}".strip() if is_option else value or name.upper()
    meaning = " ".join((about.help or "").split())
    if about.show_default and default not in (None, False, inspect.Parameter.empty):
        meaning += f" Default: {default}."
    return f"| `{shown}` | {meaning} |"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
