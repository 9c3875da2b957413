"""What a cache costs on a model, with errors and verdicts: ``validation`` runs a ``plan.ValidationPlan``.

``quality`` is llama-perplexity, ``generation`` and ``needle`` ask a server, ``check`` holds the build itself
against the specification, ``verdict`` says when a difference is one, ``assemble`` makes the result of it all.
"""
