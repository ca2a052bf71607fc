"""The captioning pipeline on Ray: configuration, stages, the dataset graph, sources and sinks."""
