"""Print what makes a shell complete the commands and their options.

examples:
  python tools/completion.py bash >> ~/.bashrc
  python tools/completion.py zsh >> ~/.zshrc
  python tools/completion.py fish > ~/.config/fish/completions/bnnfree.fish
"""

import importlib
import sys

from bnnfree.commands import cli

BASH = """\
_bnnfree() {{
  local words
  case "${{COMP_WORDS[1]}}" in
{cases}
  *) words="" ;;
  esac
  [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _bnnfree bnnfree"""
ZSH = """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit"""  # zsh then reads bash's completions
SHELLS = ("bash", "zsh", "fish")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("shell", choices=SHELLS)
    args = parser.read()
    print(script(args.shell))


def script(shell: str) -> str:
    """The text for a shell, a name of SHELLS."""
    from bnnfree.commands.console import COMMANDS

    options = {name: options_of(name) for name in COMMANDS}
    if shell == "fish":
        lines = [
            f"complete -c bnnfree -n __fish_use_subcommand -a {name} -d '{meaning}'"
            for name, meaning in COMMANDS.items()
        ]
        lines += [
            f"complete -c bnnfree -n '__fish_seen_subcommand_from {name}' -l {option.removeprefix('--')}"
            for name, found in options.items()
            for option in found
        ]
        return "\n".join(lines)
    cases = "\n".join(f'  {name}) words="{" ".join(found)}" ;;' for name, found in options.items())
    bash = BASH.format(cases=cases, commands=" ".join(COMMANDS))
    return f"{ZSH}\n{bash}" if shell == "zsh" else bash


class _Read(Exception):
    """Carries a parser out of a command that would read its arguments."""

    def __init__(self, parser: cli.Parser):
        super().__init__()
        self.parser = parser


def options_of(name: str) -> list[str]:
    """The long options of a command, as its own parser has them."""

    def stop(parser: cli.Parser, **_: str) -> None:
        raise _Read(parser)

    command, read, arguments = importlib.import_module(f"bnnfree.commands.{name}"), cli.Parser.read, sys.argv
    try:
        cli.Parser.read, sys.argv = stop, [name]  # type: ignore[assignment]
        command.main()
    except _Read as caught:
        strings = [text for action in caught.parser._actions for text in action.option_strings]
        return sorted(text for text in strings if text.startswith("--"))
    finally:
        cli.Parser.read, sys.argv = read, arguments  # type: ignore[method-assign]
    return []
