# SPDX-License-Identifier: Apache-2.0
"""JSON values as YAML that is good to read, without a library."""

import json
import re
from typing import Any

PLAIN = re.compile(r"[A-Za-z/][\w./-]*")  # strings that need no quotes in YAML
WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # but these


def to_yaml(value: Any, indent: str = "") -> str:
    """JSON values as YAML: lists and dicts in lines, strings as JSON has them."""
    if isinstance(value, dict) and value:
        return "".join(
            f"{indent}{scalar(key)}:{below(item, indent + '  ')}"
            for key, item in value.items()
        )
    if isinstance(value, list) and value:
        lines = [to_yaml(item, indent + "  ") for item in value]
        return "".join(
            f"{indent}- {text.removeprefix(indent + '  ')}" for text in lines
        )
    return f"{indent}{scalar(value)}\n"


def below(value: Any, indent: str) -> str:
    """A value of a dict, on the key's line if it fits there."""
    if isinstance(value, dict | list) and value:
        return "\n" + to_yaml(value, indent)
    if isinstance(value, str) and re.fullmatch(r"(?=\S)([ -~]*\S\n)+[ -~]*\S", value):
        return " |-\n" + "".join(f"{indent}{line}\n" for line in value.split("\n"))
    return f" {scalar(value)}\n"


def scalar(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value):
        if value.lower() not in WORDS:
            return value
    return json.dumps(value, ensure_ascii=False)
