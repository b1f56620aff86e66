# SPDX-License-Identifier: Apache-2.0
"""JSON values as YAML that is good to read, without a library."""

import json
import re
from typing import Any

PLAIN = re.compile(r"[A-Za-z/][\w./-]*")  # strings that need no quotes in YAML
LINES = re.compile(r"(?=\S)([ -~]*\S\n)+[ -~]*\S")  # that can stand as they are
WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # but these


def to_yaml(value: Any, indent: str = "") -> str:
    """JSON values as YAML: dicts and lists in lines, strings as JSON has them."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{scalar(key)}:{below(item, deeper)}" for key, item in value.items()]
    elif isinstance(value, list) and value:
        lines = [
            f"- {to_yaml(item, deeper).removeprefix(deeper)}"
            if isinstance(item, dict | list)
            else f"-{below(item, deeper)}"
            for item in value
        ]
    else:
        lines = [f"{scalar(value)}\n"]
    return "".join(indent + line for line in lines)


def below(value: Any, indent: str) -> str:
    """What follows a key or a hyphen: on its line, or in the next ones."""
    if isinstance(value, dict | list) and value:
        return "\n" + to_yaml(value, indent)
    if isinstance(value, str) and LINES.fullmatch(value):
        return " |-\n" + "".join(f"{indent}{line}\n" for line in value.split("\n"))
    return f" {scalar(value)}\n"


def scalar(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value):
        if value.lower() not in WORDS:
            return value
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", text)
