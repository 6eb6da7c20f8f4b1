package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	File    string
	Line    int    // from 1; 0: the problem is the file's as a whole
	Column  int    // from 1, in characters; 0 with Line 0
	Key     string // dotted path with indexes, such as proxies[0].backends[1].address; empty: the whole document
	Message string // what is wrong
	Remedy  string // what would be right
}

// Error prints the problem on one line: "agent.yaml:12: vips[0].address: MESSAGE; REMEDY".
func (p Problem) Error() string { return p.Finding() + "; " + p.Remedy }

// Finding prints the problem without its remedy.
func (p Problem) Finding() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	b.WriteString(p.Message)
	return b.String()
}

// Problems is every problem of one configuration, in the order of the file. It is never
// empty where it is returned as an error.
type Problems []Problem

// Error prints one problem a line.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// sorted returns the problems as an error in the order of the file, or nil for none.
func (ps Problems) sorted() error {
	if len(ps) == 0 {
		return nil
	}
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return ps
}

// position is a place in the file, both from 1.
type position struct{ line, column int }

// source remembers where the keys of a document stand.
type source struct {
	file string
	at   map[string]position // by Problem.Key; "" is the document itself
}

// problem places a problem at its key, or where the key was left out at the nearest
// enclosing one that is there.
func (s source) problem(key, message, remedy string) Problem {
	p := Problem{File: s.file, Key: key, Message: message, Remedy: remedy}
	for {
		if at, ok := s.at[key]; ok {
			p.Line, p.Column = at.line, at.column
			return p
		}
		if key == "" {
			return p
		}
		key = key[:max(0, strings.LastIndexAny(key, ".["))]
	}
}
