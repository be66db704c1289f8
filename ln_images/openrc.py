"""Turn the ``OS_*`` variables of an openrc into a keystoneauth1 auth plugin.

Each plugin names its own options, and ``OS_<OPTION>`` is the variable of each. So every plugin that
keystoneauth1 knows works. Nothing is sent here.
"""

import contextlib
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from keystoneauth1 import exceptions, loading
from keystoneauth1.loading import Opt

from ln_images.errors import cause
from ln_images.model import ConfigurationError

# An application credential carries its scope; Keystone refuses one that is given beside it.
_SCOPE = re.compile(r"system_scope|trust_id|(project|domain|project_domain)_(id|name)")
# The openstack client's own default for OS_DEFAULT_DOMAIN (osc_lib.shell, DEFAULT_DOMAIN).
_DEFAULT_DOMAIN = "default"


def load_plugin(variables: Mapping[str, str]) -> Any:
    """Return the auth plugin that ``OS_AUTH_TYPE`` names, with its options from ``OS_*``.

    Raises ConfigurationError if a variable is missing or cannot work. The plugins themselves do not
    fail before the first request, and then without the name of what they lack.
    """
    auth_type = variables.get("OS_AUTH_TYPE", "password")
    try:
        loader: Any = loading.get_plugin_loader(auth_type)
    except exceptions.NoMatchingPlugin:
        known = ", ".join(sorted(loading.get_available_plugin_names()))
        raise ConfigurationError(
            f"OS_AUTH_TYPE={auth_type} is not a known auth plugin; use one of {known}"
        ) from None
    options = _list_options(loader, variables)
    values = _read_values(auth_type, options, variables)
    _check_values(options, values)
    # A loader reads its own options through the getter. Those of the methods of v3multifactor are
    # not among them.
    own_options = {option.dest for option in loader.get_options()} - {"auth_methods"}
    others = {dest: value for dest, value in values.items() if dest not in own_options}
    try:
        return loader.load_from_options_getter(lambda option: values.get(option.dest), **others)
    except Exception as error:
        raise ConfigurationError(
            f"OS_AUTH_TYPE={auth_type}: {cause(error)}; check your openrc"
        ) from None


def refuse_system_scope(setting: str) -> None:
    """Raise ConfigurationError because ``setting`` asks for a token with system scope."""
    raise ConfigurationError(
        f"{setting} is set, and Glance and Nova do not accept a token with system scope; unset it,"
        " and name a project"
    )


def find_file(variables: Mapping[str, str], variable: str) -> str | None:
    """Return the path in a variable. Raises ConfigurationError if we cannot read the file.

    Otherwise the error would appear only inside a request, without the file's name.
    """
    path = variables.get(variable)
    if path is not None and not os.access(path, os.R_OK):
        raise ConfigurationError(f"{variable}={path} cannot be read; correct the path or its mode")
    return path


def _list_options(loader: Any, variables: Mapping[str, str]) -> dict[str, Opt]:
    """Return the options of a plugin, and those of each method that ``OS_AUTH_METHODS`` names.

    The key is the option's ``dest``, such as ``project_name``.
    """
    options = list(loader.get_options())
    if any(option.dest == "auth_methods" for option in options):
        for method in _split(variables.get("OS_AUTH_METHODS", "")):
            try:
                options += loading.get_plugin_options(method)
            except exceptions.NoMatchingPlugin:
                raise ConfigurationError(
                    f"OS_AUTH_METHODS names {method}, which is not a known auth plugin; use names"
                    " such as v3password and v3totp"
                ) from None
    return {option.dest: option for option in options}


def _read_values(
    auth_type: str, options: Mapping[str, Opt], variables: Mapping[str, str]
) -> dict[str, Any]:
    """Return the value of each option. It is None if no variable has one."""
    values: dict[str, Any] = {}
    for dest, option in options.items():
        # Deprecated spellings come last, as in keystoneauth1's own command lines.
        names = [
            f"OS_{spelling.name.replace('-', '_').upper()}"
            for spelling in (option, *option.deprecated)
        ]
        set_values = [variables[name] for name in names if name in variables]
        values[dest] = set_values[0] if set_values else option.default
    if isinstance(values.get("auth_methods"), str):
        values["auth_methods"] = _split(values["auth_methods"])
    if auth_type == "v3applicationcredential":
        return {dest: value for dest, value in values.items() if not _SCOPE.fullmatch(dest)}
    _add_default_domain(values, variables)
    return values


def _add_default_domain(values: dict[str, Any], variables: Mapping[str, str]) -> None:
    """Add the default domain to a user or project name that has no domain.

    This is what the openstack client does (osc_lib.cli.client_config, ``_auth_default_domain``).
    """
    if values.get("default_domain_id") or values.get("default_domain_name"):
        return
    default_domain = variables.get("OS_DEFAULT_DOMAIN", _DEFAULT_DOMAIN)
    for name, domain in (("username", "user_domain"), ("project_name", "project_domain")):
        has_domain = values.get(f"{domain}_id") or values.get(f"{domain}_name")
        if f"{domain}_id" in values and values.get(name) and not has_domain:
            values[f"{domain}_id"] = default_domain


def _check_values(options: Mapping[str, Opt], values: Mapping[str, Any]) -> None:
    """Raise ConfigurationError if a value is missing or cannot work."""
    if values.get("system_scope"):
        refuse_system_scope("OS_SYSTEM_SCOPE")
    missing = _list_missing(options, values)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigurationError(
            f"{' and '.join(missing)} {verb} not set; run `source admin-openrc` first, or use"
            " --os-cloud"
        )
    if "auth_url" in options and not _is_url(str(values["auth_url"])):
        raise ConfigurationError("OS_AUTH_URL is not an http or https URL; correct your openrc")


def _list_missing(options: Mapping[str, Opt], values: Mapping[str, Any]) -> list[str]:
    """Return the variables without which the plugin fails late, or without naming what it lacks."""
    needed: list[tuple[str, ...]] = [
        (dest,)
        for dest, option in options.items()
        if option.required or option.prompt or dest == "token"
    ]
    if "user_id" in options and any(option.prompt for option in options.values()):
        needed.append(("username", "user_id"))
    if "application_credential_id" in options:
        needed.append(("application_credential_id", "application_credential_name"))
    return [
        f"OS_{alternatives[0].upper()}"
        for alternatives in needed
        if not any(values.get(dest) for dest in alternatives)
    ]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_url(text: str) -> bool:
    """Return whether a server can have this URL.

    For example it returns False for ``http://host:99999``: urllib.parse raises ValueError then.
    """
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    return False
