"""From a model and example arguments to a Program, through Dynamo and AOTAutograd."""
