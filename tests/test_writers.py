"""No file is written past the two boundaries that keep it whole on a full disk and name it in the error.

Those are t2i_lm.storage (`atomic_file`, `atomic_folder`, `writing`, `write_atomic`) and callbacks.files.
"""

import ast
from pathlib import Path

from tests.test_layers import MODULES, ROOT, module_name

BOUNDARIES = {"atomic_file", "atomic_folder", "writing"}
# Calls that write a file, by the name of the function or method. `save` is that of images, numpy and torch.
WRITERS = {
    "copyfile",
    "save",
    "save_file",
    "save_pretrained",
    "save_to_disk",
    "savefig",
    "savez",
    "savez_compressed",
    "write_bytes",
    "write_text",
}
MODES = set("wax+")
# What writes in another way, and why.
ELSEWHERE = {
    "callbacks.checkpoints": "RunCheckpoints.save, and Lightning's save_checkpoint",
    "callbacks.preemption": "RunCheckpoints.save",
    "callbacks.files.atomic": "a boundary itself",
    "callbacks.files.checkpoint_io": "a boundary itself",
    "callbacks.files.metrics_file": "opened to be cut, which takes no space",
    "t2i_lm.plots.catalogue": "Rendered.save and CompletionsTable.save, of this suite",
    "t2i_lm.data.shards.format": "_write_part, which write_part calls inside of `writing`",
    "t2i_lm.runtime.lasting_loggers": "save of Lightning's loggers, whose errors it catches",
    "t2i_lm.runtime.output": "/dev/null",
    "t2i_lm.training.jobs": "the log of a job, whose writes never fail (LastingOutput)",
}


def writes(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("open", "fdopen"):
        position = 0 if name == "open" and isinstance(function, ast.Attribute) else 1
        found = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[position:]
        mode = found[0] if found else None
        return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and bool(MODES & set(mode.value))
    return name in WRITERS


def in_memory(call: ast.Call, function: ast.AST) -> bool:
    """Whether a call writes into a BytesIO of its function."""
    buffers = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name) and ast.unparse(node.value.func).endswith("BytesIO")
    }
    return any(isinstance(argument, ast.Name) and argument.id in buffers for argument in call.args)


def unprotected(source: str) -> list[int]:
    """Lines of calls that write a file outside of the boundaries."""
    found: list[int] = []

    def visit(node: ast.AST, inside: bool, function: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node
        if isinstance(node, ast.With):
            for item in node.items:
                visit(item, inside, function)
                call = item.context_expr
                inside |= isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in BOUNDARIES
            for statement in node.body:
                visit(statement, inside, function)
            return
        if isinstance(node, ast.Call) and not inside and writes(node) and not in_memory(node, function):
            found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, inside, function)

    tree = ast.parse(source)
    visit(tree, False, tree)
    return found


def test_the_check_finds_writers_and_knows_boundaries() -> None:
    for line in ("p.write_text('x')", "open(p, 'w')", "p.open('ab')", "figure.savefig(p)", "np.savez(p, x=1)"):
        assert unprotected(line) == [1], line
        assert unprotected(f"with atomic_file(p) as own:\n    {line}") == [], line
    assert unprotected("with atomic_file(p) as own, own.open('w') as f:\n    pass") == []
    assert unprotected("with own.open('w') as f, atomic_file(p):\n    pass") == [1]
    assert unprotected("p.open()\nopen(p, 'rb')\nos.open(p, 0)") == []
    assert unprotected("def f():\n    b = io.BytesIO()\n    image.save(b)\n    image.save(c)") == [4]


def test_every_writer_is_inside_a_boundary() -> None:
    free = {
        module_name(path): [f"{path.relative_to(ROOT)}:{line}" for line in lines]
        for path in MODULES
        if (lines := unprotected(Path(path).read_text(encoding="utf-8")))
    }
    assert not {name: places for name, places in free.items() if name not in ELSEWHERE}
    assert set(ELSEWHERE) == set(free), "exceptions that are none"
