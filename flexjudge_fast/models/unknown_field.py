"""The error for a field of a config.json that nobody here knows."""

from flexjudge_fast.errors import UnsupportedCheckpointError


def unknown_field(part: str, name: str, value: object) -> UnsupportedCheckpointError:
    """part: of the config, with a dot behind it; empty for the outermost."""
    return UnsupportedCheckpointError(
        f"config field {part}{name}={value!r} is unknown and may change the maths; "
        f"pass ignore_config=[{name!r}] if it does not"
    )
