"""Not there: see tasks/lean_imports.py.

jsonschema, which Prefect, MLflow and Ray import, checks addresses in other alphabets by it, if told to. Importing it
builds a grammar, for seconds.
"""

raise ImportError("jsonschema does without it")
