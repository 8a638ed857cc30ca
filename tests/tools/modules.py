"""Checks that the top-level modules of src/ do not depend on each other in a cycle.

Reads src/lib.rs and every file that its `mod` declarations lead to, except code that only tests or fuzzing compile. A
dependency is a path that starts with `crate::`, or that reaches the crate's root with `super::`. Prints the modules in
dependency order, lowest first, then each cycle with the lines that form it; exits 1 if there is a cycle.

`modules.py --self-test` checks this program on an invented crate.
"""

import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

from facade import ROOT, Checks

# Comments, strings and character literals match without the group `token` and are dropped. A lifetime is two tokens.
TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | \b[bc]?r(?P<hashes>\#*)".*?"(?P=hashes) | "(?:\\.|[^"\\])*" | '(?:\\.[^']*|[^'\\])'
    | (?P<token> \w+ | :: | \S )""",
    re.VERBOSE | re.DOTALL,
)
OPENING, CLOSING = set("([{"), set(")]}")
# The end of what an attribute applies to: an item ends with a semicolon or its braces; a field, arm or argument also with a comma.
SEMICOLON_ITEMS = {"const", "let", "static", "type", "use"}
OTHER_ITEMS = {"async", "enum", "extern", "fn", "impl", "macro_rules", "mod", "struct", "trait", "union", "unsafe"}
TEST_SETTINGS = {"test", "fuzzing"}


class Token(NamedTuple):
    text: str
    line: int


class Dependency(NamedTuple):
    module: str
    needs: str
    place: str


class Crate:
    """The top-level modules of a crate, and every line in which one needs another."""

    def __init__(self, source):
        self._source = source
        self._found = []
        self.modules = []
        self._read_file(source / "lib.rs", ())
        self.dependencies = [
            found for found in self._found if found.needs in self.modules and found.needs != found.module
        ]

    def needs(self, module):
        return {found.needs for found in self.dependencies if found.module == module}

    def reach(self, module):
        """The modules that this one needs, directly or through others. Contains itself only if it is in a cycle."""
        reached, waiting = set(), [module]
        while waiting:
            new = self.needs(waiting.pop()) - reached
            reached |= new
            waiting += new
        return reached

    def in_order(self):
        """Each module after the modules that it needs: its own reach is larger than theirs."""
        return sorted(self.modules, key=lambda module: (len(self.reach(module) | {module}), module))

    def cycles(self):
        """The groups of modules that all reach each other."""
        reach = {module: self.reach(module) for module in self.modules}
        groups = {
            frozenset(other for other in reach[module] if module in reach[other])
            for module in self.modules
            if module in reach[module]
        }
        return sorted(map(sorted, groups))

    def _read_file(self, path, module):
        self._read(tokens_of(path.read_text()), path, module)

    def _read(self, tokens, path, module):
        at = 0
        while tokens[at].text:
            text, line = tokens[at]
            following = tokens[at + 1].text
            if text == "#" and following == "[":
                end = group_end(tokens, at + 1)
                words = [token.text for token in tokens[at + 2 : end - 1]]
                at = end if is_shipped(words) else item_end(tokens, end)
            elif text == "mod" and tokens[at + 2].text in (";", "{"):
                at = self._read_module(tokens, at + 1, path, module)
            elif text in ("crate", "self", "super") and following == "::":
                paths, at = path_tree(tokens, at)
                place = f"{path.relative_to(self._source.parent)}:{line}"
                targets = [absolute(found, module) for found in paths] if module else []
                self._found += [Dependency(module[0], target[0], place) for target in targets if target]
            else:
                at += 1

    def _read_module(self, tokens, at, path, parent):
        """Reads the module whose name stands at `at`, and returns the index after its declaration."""
        name = tokens[at].text
        module = (*parent, name)
        if not parent:
            self.modules.append(name)
        if tokens[at + 1].text == "{":
            end = group_end(tokens, at + 1)
            self._read([*tokens[at + 2 : end - 1], Token("", 0)], path, module)
            return end
        folder = self._source.joinpath(*parent)
        files = [file for file in (folder / f"{name}.rs", folder / name / "mod.rs") if file.exists()]
        if len(files) != 1:
            raise SystemExit(f"{path}:{tokens[at].line}: expected one file for module {'::'.join(module)}, found {files}")
        self._read_file(files[0], module)
        return at + 2


def tokens_of(text):
    """The tokens of a Rust file; an empty one marks its end."""
    tokens, line, counted = [], 1, 0
    for match in TOKEN.finditer(text):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        if match["token"]:
            tokens.append(Token(match["token"], line))
    return [*tokens, Token("", line)]


def group_end(tokens, at):
    """The index after the bracket that closes the one at `at`."""
    depth = 0
    while True:
        depth += (tokens[at].text in OPENING) - (tokens[at].text in CLOSING)
        at += 1
        if depth == 0:
            return at


def item_end(tokens, at):
    """The index after the item, field or arm that begins at `at`."""
    while tokens[at].text == "#":
        at = group_end(tokens, at + 1)
    if tokens[at].text == "pub":
        at = group_end(tokens, at + 1) if tokens[at + 1].text == "(" else at + 1
    first, second = tokens[at].text, tokens[at + 1].text
    braces_end_it = first not in SEMICOLON_ITEMS or (first == "const" and second in OTHER_ITEMS)
    comma_ends_it = first not in SEMICOLON_ITEMS | OTHER_ITEMS
    while True:
        text = tokens[at].text
        if text == "" or text in CLOSING:
            return at
        if text in OPENING:
            at = group_end(tokens, at)
            if text == "{" and braces_end_it:
                return at
            continue
        at += 1
        if text == ";" or (text == "," and comma_ends_it):
            return at


def is_shipped(attribute):
    """False for an attribute whose item only tests or fuzzing compile."""
    return attribute[:1] != ["cfg"] or can_be(True, attribute[2:-1])


def can_be(value, predicate):
    """Whether a predicate of cfg can have this value in a build that ships: without tests and fuzzing."""
    name, *rest = predicate
    if rest[:1] != ["("]:
        return name not in TEST_SETTINGS or value is False
    parts = split(rest[1:-1])
    if name == "not":
        return can_be(not value, parts[0])
    combine = any if (name == "any") == value else all
    return combine(can_be(value, part) for part in parts)


def split(words):
    """Splits at the commas that are in no bracket."""
    parts, depth = [[]], 0
    for word in words:
        depth += (word in OPENING) - (word in CLOSING)
        if word == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def path_tree(tokens, at):
    """The paths of an expression or a `use`, with its groups expanded, and the index after them."""
    prefix = []
    while tokens[at].text != "{":
        prefix.append(tokens[at].text)
        at += 1
        if tokens[at].text != "::":
            return [tuple(prefix)], at
        at += 1
    paths = []
    at += 1
    while tokens[at].text != "}":
        if tokens[at].text == ",":
            at += 1
        elif tokens[at].text == "as":
            at += 2
        else:
            inner, at = path_tree(tokens, at)
            paths += [(*prefix, *path) for path in inner]
    return paths, at + 1


def absolute(path, module):
    """The path from the crate's root."""
    if path[0] == "crate":
        return path[1:]
    base = module
    for number, part in enumerate(path):
        if part == "super":
            base = base[:-1]
        elif part != "self":
            return (*base, *path[number:])
    return base


def check(source):
    checks = Checks()
    crate = Crate(source)
    for module in crate.in_order():
        print(f"      {module:16}{', '.join(sorted(crate.needs(module))) or '-'}")
    for cycle in crate.cycles():
        print(f"\n      cycle: {', '.join(cycle)}")
        for module in cycle:
            for needed in sorted(crate.needs(module) & set(cycle)):
                places = [found.place for found in crate.dependencies if found[:2] == (module, needed)]
                more = f" and {len(places) - 1} more" if len(places) > 1 else ""
                print(f"      {module} needs {needed}: {places[0]}{more}")
    checks.equal(f"cycles among {len(crate.modules)} modules", crate.cycles(), [])
    checks.finish()


INVENTED = {
    "lib.rs": """
        pub mod base;
        pub mod first;
        pub mod second;
        pub mod third;
        pub mod fourth;
        pub mod top;
        #[cfg(any(test, fuzzing))]
        pub mod random;
        pub mod inline { use crate::base::{self, Item}; }
    """,
    "base.rs": r"""
        // crate::top
        /* crate::top */
        const TEXT: &str = "crate::top \" crate::top";
        const RAW: &str = r#"crate::top " crate::top"#;
        const QUOTE: char = '"';
        fn shared<'a>(text: &'a str) -> &'a str { text }
        #[cfg(test)]
        use crate::{first, top};
        #[cfg(test)]
        const fn only_in_tests() { crate::top::run() }
        #[cfg(all(test, unix))]
        mod tests { mod deep { use crate::top; } }
        struct Both { #[cfg(test)] seen: crate::top::Seen, kept: u8 }
        mod inner { use super::super::random; }
    """,
    "first.rs": "use crate::{base, second::Item as Other};",
    "second.rs": "fn run() { let one = crate::first::run::<crate::base::Item>(); }",
    "third/mod.rs": "mod deep;",
    "third/deep.rs": "#[cfg(not(test))]\nfn run() { super::super::fourth::run() }",
    "fourth.rs": "use super::{base::{self, Item}, third};",
    "top.rs": "use crate::{first, fourth, inline}; use self::own::Thing; mod own {}",
    "random.rs": "use crate::top;",
}


def self_test():
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        for name, text in INVENTED.items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        crate = Crate(source)
    checks.equal("cycles by a group and by super::super", crate.cycles(), [["first", "second"], ["fourth", "third"]])
    checks.equal("comments, strings and tests need nothing", crate.needs("base"), set())
    checks.equal("a group names several modules", crate.needs("first"), {"base", "second"})
    checks.equal("paths in expressions and in type arguments", crate.needs("second"), {"base", "first"})
    checks.equal("modules in files of their own", crate.needs("third"), {"fourth"})
    checks.equal("nested groups after super", crate.needs("fourth"), {"base", "third"})
    checks.equal("modules within a file", crate.needs("inline"), {"base"})
    places = [found.place for found in crate.dependencies if found.module == "third"]
    checks.equal("the line of a dependency", places, ["src/third/deep.rs:2"])
    order = crate.in_order()
    checks.equal("test-only modules are left out", sorted(order), sorted({*"base first second third fourth top inline".split()}))
    checks.equal("lowest and highest module", (order[0], order[-1]), ("base", "top"))
    checks.finish()


if __name__ == "__main__":
    if sys.argv[1:] == ["--self-test"]:
        self_test()
    elif sys.argv[1:]:
        raise SystemExit("usage: modules.py [--self-test]")
    else:
        check(ROOT / "src")
