"""The result of a validation as people read it: a self-contained page (``html``) and tables (``terminal``).

What goes in is the dict that ``measure.validate.assemble`` makes. Drawing is done by ``svg`` and ``plots``;
nothing is loaded from anywhere.
"""
