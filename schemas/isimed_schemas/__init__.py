"""Language-neutral contracts of an isimed store: prose spec, JSON Schemas, Arrow field lists and examples."""
