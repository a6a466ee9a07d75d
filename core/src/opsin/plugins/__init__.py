"""Plugins: found through entry points, checked, and indexed by what they provide.

The result does not depend on the order of plugins. Three things can be wrong with one:

- It cannot be imported, or a hook raises: it is kept in `Plugins.failures` with its reason, which is quoted
  when something is missing. This is fatal only if the allow list names the plugin.
- It breaks the contract (unknown hook, unknown argument, wrong return type): `PluginError`, at once.
- It claims what another one claims: `PluginConflictError`, unless ``prefer`` decides.
"""

from opsin.plugins.discovery import load_plugins
from opsin.plugins.index import Plugins

__all__ = ["Plugins", "load_plugins"]
