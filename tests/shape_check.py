"""Check shapes and types at every call of a function whose signature has a shape (jaxtyping, beartype).

Functions without shapes, and those inside of others, are left as they are: types are checked without running, and every
check costs as much as a small operation on a tensor.
"""

import ast
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

TYPES = beartype(conf=BeartypeConf(is_pep484_tower=True))  # whole numbers where a float is wanted, as Python has it


def checked(function):
    """What the import hook puts below the decorators of a function."""
    return jaxtyped(function, typechecker=TYPES)


def check_shapes(package: str) -> None:
    """Check the shapes of a package, in this process, in whatever of it is imported from now on."""
    sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Loads a module with `checked` functions and dataclasses."""

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"from jaxtyping import" not in source:
            return super().get_code(fullname)
        tree = ast.parse(source, path)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        shapes = {alias.asname or alias.name for node in imports if node.module == "jaxtyping" for alias in node.names}
        for node in _definitions(tree):
            if shapes & _names_of(_hints(node)):
                place = 0 if isinstance(node, ast.ClassDef) else len(node.decorator_list)
                node.decorator_list.insert(place, ast.copy_location(ast.Name("_checked_", ast.Load()), node))
        tree.body[1:1] = ast.parse("from shape_check import checked as _checked_").body  # behind the docstring
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


def _definitions(tree: ast.Module | ast.ClassDef):
    """The classes and functions of a module, and those in its classes."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node)


def _hints(node) -> list[ast.expr | None]:
    """The annotations of a function's signature, or of a class's fields."""
    if isinstance(node, ast.ClassDef):
        return [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
    return [node.returns, *(argument.annotation for argument in ast.walk(node.args) if isinstance(argument, ast.arg))]


def _names_of(hints) -> set[str]:
    return {node.id for hint in hints if hint for node in ast.walk(hint) if isinstance(node, ast.Name)}
