"""Sharding rules of every op rolemesh knows, one file per family."""

from rolemesh.passes.rules.custom import register_rule
from rolemesh.passes.rules.defaults import default_rules
from rolemesh.passes.rules.registry import MissingRuleWarning, Rules

__all__ = ["MissingRuleWarning", "Rules", "default_rules", "register_rule"]
