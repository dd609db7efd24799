"""What can be changed where: Cosmic Ray's operators, sampled by place."""

import ast
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

# `==` for `is` is no change for small numbers and interned strings; the variable operators need names to be given
LEFT_OUT = ("Eq_Is", "NotEq_IsNot", "Is_Eq", "IsNot_NotEq", "VariableReplacer", "VariableInserter")


class Mutant(NamedTuple):
    module: str
    place: tuple[int, int]  # line and column
    operator: str
    code: str

    @property
    def key(self) -> str:
        return f"{self.module}:{self.place[0]}:{self.place[1]}:{self.operator}"


def unnoticed(tree: ast.Module) -> Iterator[ast.AST]:
    """The parts of a module whose change no test should notice."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name="__repr__"):
                yield from node.body
            case ast.FunctionDef(returns=ast.AST()):
                yield node.returns
            case ast.arg(annotation=ast.AST()) | ast.AnnAssign():
                yield node.annotation
            case ast.keyword(arg="strict" | "slots"):
                yield node.value
            case ast.Raise():
                yield from (part for part in ast.walk(node) if isinstance(part, ast.JoinedStr))


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """By line and column, the operators that apply there, each with the number of its occurrence."""
    silent = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in unnoticed(ast.parse(source))
    ]
    found, nodes = defaultdict(list), list(ast_nodes(get_ast(source)))
    for name in operator_names():
        if name.endswith(LEFT_OUT):
            continue
        operator = get_operator(name)()
        spots = (spot for node in nodes for spot in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(spots):
            if not any(first <= start < last for first, last in silent):
                found[start].append((name, occurrence))
    return found


def compiles(code: str, source: str) -> bool:
    try:
        return ast.dump(ast.parse(code)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def draw(module: str, source: str, seed: int) -> Iterator[Mutant]:
    """Every place of a module in random order, with one random change that compiles."""
    rng, found = random.Random(f"{seed} {module}"), places(source)
    for place in rng.sample(sorted(found), len(found)):
        for name, occurrence in rng.sample(found[place], len(found[place])):
            code = mutate_code(source, get_operator(name)(), occurrence)
            if code and compiles(code, source):
                yield Mutant(module, place, name.removeprefix("core/"), code)
                break


def sample(sources: dict[str, str], size: int, seed: int) -> tuple[list[Mutant], Counter]:
    """``size`` mutants or a few more, so that no module has too few to tell; and how many places each module has."""
    mutants = {module: list(draw(module, source, seed)) for module, source in sources.items()}
    total = sum(map(len, mutants.values()))
    share = {module: max(size // 40, round(size * len(all_) / total)) for module, all_ in mutants.items()}
    drawn = [mutant for module, all_ in mutants.items() for mutant in all_[: share[module]]]
    return drawn, Counter({module: len(all_) for module, all_ in mutants.items()})
