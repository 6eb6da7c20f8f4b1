// Package deploy holds the files with which an agent is deployed, for hactl to print.
//
// What it is not: what knows how a configuration changes them; that is package cli.
package deploy

import _ "embed" // for the unit

// Unit is hameshd.service, for a configuration with its files in their usual places.
//
//go:embed hameshd.service
var Unit string
