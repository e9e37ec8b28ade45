"""Self-improvement loops: a model makes, scores and labels its own preference data and is trained on it.

Each stage is a module with one dataclass of settings and one function, and a command: ``generate``, ``score``,
``pairs``, ``synpo`` (prompts, improve), ``loop`` (iterate), ``report``, ``export``. ``stage`` and ``manifest``
make them resumable; ``engines`` complete prompts, ``scorers`` judge answers.
"""
