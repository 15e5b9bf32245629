namespace hasten {}
