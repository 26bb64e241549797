"""Projects of the kind that Reprise retrains: a module, a pipeline.toml and real data each; none imports Reprise."""
