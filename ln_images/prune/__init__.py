"""The command ``ln-images-prune``: it retires, restores and removes bases that no disk uses.

Read ``rules.py`` first: it has every rule. ``reports.py`` reads what the compute nodes wrote,
``nova.py`` lists the compute hosts, and ``evidence.py`` puts both together with Glance's images.
``bases.py`` is the only code of this project that renames or removes a file in the cache.
``clean_up.py`` has one pass, from top to bottom. ``lost.py`` and ``nodes.py`` only report.
"""
