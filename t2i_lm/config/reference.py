"""docs/configuration.md: every key, its default and its meaning, from the docstrings of the config.

Written by `make docs`.
"""

import ast
import inspect
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import ModuleType

from t2i_lm.config import experiment, forgetting, image_tokenizer, lora, sections
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.storage.writing import write_atomic

PATH = Path("docs/configuration.md")
HEAD = """# Configuration

Written by `make docs` from the docstrings in `t2i_lm/config/`; edit those.

An experiment is merged from `experiments/base.yaml`, `experiments/scale/SCALE.yaml`, its own YAML file and `key=value`
on the command line, later ones winning. An unknown key or a wrong value is refused before anything heavy is imported.
The result is written to the run folder as `config.yaml`. `python -m t2i_lm.train EXPERIMENT.yaml --dry-run` prints it
without training.

The type of a key says what its value means, in files and on the command line alike:

| type | value |
|---|---|
| text | as it is written, without quotes: `data.path="photos #2"`, `name=007`, `name=on`; a file may quote it |
| text that may be null | the same; `null`, `~` and nothing are null, unless a file quotes them |
| path | text; `~/` is the home folder; a run's relative paths start where it was started (env.json) |
| number | finite; a whole number may be `1e3` or `1_000` |
| true or false | also `yes`, `no`, `on`, `off`, `1`, `0` |
| list | `[a, 'b, with a comma']`; one value without brackets is a list of one: `freeze=ffn` |

Of a key that is given twice on the command line the last value counts; in a file it is refused.

Paths of weights, tokenizers and held-out text may also be `asset:NAME` (shipped); those of weights and tokenizers also
`hf://ORG/NAME[@REVISION][/FILE][#sha256=HEX]` (the Hugging Face hub) or a plug-in ([plugins.md](plugins.md)). Numbers
of sections are those of the paper.
"""


def reference() -> str:
    """The text of docs/configuration.md."""
    modules = (sections, forgetting, image_tokenizer, lora, experiment)
    documented = {name: keys for module in modules for name, keys in _docstrings(module).items()}
    parts = [HEAD, *_table("Experiment", ExperimentConfig, "", documented)]
    return "\n".join(parts)


def write_reference() -> None:
    """Writes docs/configuration.md."""
    write_atomic(PATH, reference())


def _table(title: str, section: type, prefix: str, documented: dict[str, dict[str, str]]) -> list[str]:
    """The table of a section and, after it, those of its own sections."""
    rows, nested = [], list[str]()
    for key in fields(section):
        default = _default(key)
        if is_dataclass(default):
            name = f"{prefix}{key.name}"
            nested += _table(f"`{name}`", type(default), f"{name}.", documented)
        else:
            meaning = documented[section.__name__][key.name].replace("|", r"\|")
            rows.append(f"| `{prefix}{key.name}` | `{_yaml(default)}` | {meaning} |")
    about = inspect.getdoc(section)
    assert about is not None
    head = [f"## {title}", "", about, "", "| key | default | meaning |", "|---|---|---|"]
    return [*head, *rows, "", *nested]


def _default(key: "Field[object]") -> object:
    return key.default if key.default_factory is MISSING else key.default_factory()


def _yaml(value: object) -> str:
    """A default as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _docstrings(module: ModuleType) -> dict[str, dict[str, str]]:
    """Docstrings of the attributes of each class, by class and attribute, each in one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = own = {}
            for key, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(key, ast.AnnAssign)
                    and isinstance(key.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    own[key.target.id] = " ".join(str(text.value.value).split())
    return found
