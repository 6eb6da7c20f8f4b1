// Package config reads an agent's configuration file and says everything that is wrong
// with it at once, each with file, line, key and remedy. What it returns is complete:
// typed, defaults filled in, and free of contradictions. It also says what differs between
// two configurations, and what of that takes a restart.
//
// What it is not: it changes nothing, opens no certificate, and looks at the machine
// only where the caller hands it a [Host]. It does not watch the file.
package config
