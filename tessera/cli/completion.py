"""``completion``: the script with which a shell completes a command's options and runs."""

from __future__ import annotations

import click

from tessera.cli.common import epilog

_SHELLS = ("bash", "zsh", "fish")


def completion_command(program: str) -> click.Command:
    """The command ``completion`` of ``program``."""

    @click.command(
        "completion",
        epilog=epilog(
            f"{program} completion bash >> ~/.bashrc",
            f"{program} completion zsh >> ~/.zshrc",
            f"{program} completion fish > ~/.config/fish/completions/{program}.fish",
        ),
    )
    @click.argument("shell", type=click.Choice(_SHELLS))
    def completion(shell: str) -> None:
        """Print the script that completes commands, options and run ids in SHELL."""
        from click.shell_completion import get_completion_class

        found = get_completion_class(shell)
        assert found is not None, shell
        group = click.get_current_context().find_root().command
        variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
        click.echo(found(group, {}, program, variable).source())

    return completion
